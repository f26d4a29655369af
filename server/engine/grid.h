// Alphabets: scales and zero points, and the codes they allow.

#ifndef CERTIQ_ENGINE_GRID_H_
#define CERTIQ_ENGINE_GRID_H_

#include <cmath>
#include <cstdint>
#include <vector>

#include "absl/status/statusor.h"
#include "engine/run_context.h"
#include "engine/spec.h"
#include "engine/strip_matrix.h"

namespace certiq::engine {

// A code u in [lowest_code, highest_code] of row r and group g stands for
// scale[r, g] * (u - zero[r, g]), rounded to float32.
struct Grid {
  int64_t rows = 0;
  int64_t groups = 0;
  int32_t lowest_code = 0;
  int32_t highest_code = 0;
  // Row-major [rows, groups]; positive and finite.
  std::vector<float> scale;
  std::vector<int32_t> zero;
};

// The code nearest to value on a grid of this step and zero, ties to even, before clipping. The
// quotient of two float32 is taken in float64, where a tie is a tie only if it
// is one exactly: absmax scales put the largest weight next to one.
inline float FreeCode(float value, float scale, float zero) {
  return static_cast<float>(
             std::nearbyint(static_cast<double>(value) / static_cast<double>(scale))) +
         zero;
}

// (S1) absmax over each group of the columns [g group_size, (g + 1) group_size):
//   symmetric   scale = 2 max|w| / (2^b - 1), zero = 2^(b-1);
//   asymmetric  scale = (max(w, 0) - min(w, 0)) / (2^b - 1), zero = rint(-min(w, 0) / scale).
// A group of zeros has scale 1. Scales are rounded to spec.scale_dtype before
// the zero point is chosen; one that the type cannot hold is INVALID_ARGUMENT.
absl::StatusOr<Grid> AbsmaxGrid(const ResolvedSpec& spec, const StripMatrix& weights,
                                const RunContext& context);

}  // namespace certiq::engine

#endif  // CERTIQ_ENGINE_GRID_H_
