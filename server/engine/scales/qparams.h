// Quantization parameters: scales and zero points, the grid of codes they span, and how they are
// found from weights alone (S1, S2).

#ifndef CERTIQ_ENGINE_SCALES_QPARAMS_H_
#define CERTIQ_ENGINE_SCALES_QPARAMS_H_

#include <cmath>
#include <cstdint>
#include <limits>
#include <vector>

#include "absl/status/status.h"
#include "engine/kernels/strip_matrix.h"
#include "engine/run_context.h"
#include "engine/spec.h"

namespace certiq::engine {

class PackedMetric;

// A scale and its zero point.
struct QuantParams {
  float scale = 1;
  int32_t zero = 0;
  // Whether the type of scales or levels is too coarse for the weights, so that their only level is
  // 0: every code is `zero`, and the scale, LeastScale, is there for readers.
  bool vanishes = false;
};

// A code u in [lowest_code, highest_code] of row r at feature j stands for
// scale[r, g] (u - zero[r, g]) with g = group_of[j], rounded to level_type.
struct Grid {
  int64_t rows = 0;
  int64_t groups = 0;
  int32_t lowest_code = 0;
  int32_t highest_code = 0;
  DType level_type = DType::kF32;
  // Row-major [rows, groups]; positive and finite.
  std::vector<float> scale;
  std::vector<int32_t> zero;
  // Of the same shape: 1 where every code is the zero point (QuantParams::vanishes).
  std::vector<uint8_t> vanishes;
  // [features], in the order the features are worked on.
  std::vector<int32_t> group_of;

  size_t At(int64_t row, int64_t feature) const {
    return static_cast<size_t>(row * groups + group_of[static_cast<size_t>(feature)]);
  }
  QuantParams Params(size_t at) const { return {scale[at], zero[at], vanishes[at] != 0}; }
  void Set(size_t at, QuantParams params) {
    scale[at] = params.scale;
    zero[at] = params.zero;
    vanishes[at] = params.vanishes ? 1 : 0;
  }
  // The weight a code stands for.
  float Level(int64_t row, int64_t feature, int32_t code) const {
    const size_t at = At(row, feature);
    return RoundTo(level_type, scale[at] * static_cast<float>(code - zero[at]));
  }
};

// The zero points that a search may choose. A symmetric grid has one more level below zero than
// above. With signed scales it may be the other way round: what leaves the engine as a negative
// scale is, inside, the mirrored grid, a positive scale with one zero point less (TurnMirrored).
struct ZeroPoints {
  int32_t first = 0;
  int32_t last = 0;
};
ZeroPoints AllowedZeroPoints(const ResolvedSpec& spec);

// The code nearest to value on a grid of this scale and zero, ties to even, before clipping. The
// quotient of two float32 is taken in float64, where a tie is a tie only if it
// is one exactly: absmax scales put the largest weight next to one.
inline float FreeCode(float value, float scale, float zero) {
  return static_cast<float>(
             std::nearbyint(static_cast<double>(value) / static_cast<double>(scale))) +
         zero;
}

// The scale that spans [low, high], low <= 0 <= high (S1):
//   symmetric   scale = 2 max(-low, high) / (2^b - 1), zero = 2^(b-1);
//   asymmetric  scale = (high - low) / (2^b - 1), zero = rint(-low / scale).
// Both 0: scale 1. The scale is rounded to spec.scale_dtype first. Where that is 0, or every level
// is in the level type, the group vanishes, with zero = 2^(b-1); where it is infinite, CheckScales
// refuses it.
QuantParams AbsmaxQuantParams(const ResolvedSpec& spec, float low, float high);

// The least scale that no reader takes for 0: the least normal number of the type, as processors
// may flush subnormal ones.
float LeastScale(DType scale_dtype);

// The scale for these values by a rule that looks at nothing else: (S1), or (S2), the shrink
// search: of the scales that span p [low, high], p = 1, 0.99 ... 0.21, and the zero points that the
// spec allows, the first pair that minimises sum |w - q|^2.4 (scales and exponent as in the GPTQ
// authors' code, which leaves the zero point where the range has it); of a scale and its mirror
// image, where both are allowed, the former. A scale costs less than a rounding of all values, as
// those that cannot be the best are given up early.
QuantParams FitQuantParams(const ResolvedSpec& spec, const float* values, int64_t count);

// Whether the rule looks at a metric too.
inline bool HasMetric(ScaleRule rule) {
  return rule == ScaleRule::kPiso || rule == ScaleRule::kCompensated;
}

// A scale times `multiplier`, rounded to spec.scale_dtype, with the same zero point; the scale
// itself where that type cannot hold it.
QuantParams StretchedQuantParams(const ResolvedSpec& spec, QuantParams params, float multiplier);

// What the scale trials multiply scales by: 1, and n - 1 more around it, a factor apart. Empty for
// n <= 1.
std::vector<float> TrialMultipliers(int32_t n);

// An empty grid for this layer in natural order, or in `order` (feature i
// worked on is original feature order[i]): static groups belong to the
// original columns, dynamic ones to runs of group_size in the order.
Grid MakeGrid(const ResolvedSpec& spec, int64_t rows, int64_t features,
              const std::vector<int64_t>& order);

// The metric M (S3) that scales are found by, besides the weights.
struct ScaleMetric {
  // Its diagonal, one a feature in working order; only where the rule has a metric.
  std::vector<double> diagonal;
  // All of it for dynamic groups; null where it is diagonal. FillQuantParams does not look at it.
  const PackedMetric* full = nullptr;
  // Groups from this one on get the scale of (S1), for the sweep to replace.
  int64_t searched_groups = std::numeric_limits<int64_t>::max();
};

// Fills the scales from `weights` (in working order) by the spec's rule, or
// from the spec's explicit grid; for a full metric by its diagonal, which is where the search of
// (S3) starts. Dynamic groups are filled too, from the original weights.
void FillQuantParams(const ResolvedSpec& spec, const StripMatrix& weights,
                     const RunContext& context, Grid& grid, const ScaleMetric& metric = {});

// Gives mirrored scales their negative scale: level s (u - 2^(b-1) + 1) of code u is level
// -s (u' - 2^(b-1)) of u' = 2^b - 1 - u. `codes` is row-major [rows, features], in the grid's
// order.
void TurnMirrored(const ResolvedSpec& spec, Executor& executor, Grid& grid,
                  UnsetVector<uint8_t>& codes);

// INVALID_ARGUMENT naming the row (row_names[r] where they are not empty) and group of a scale that
// passes its type's range.
absl::Status CheckScales(const ResolvedSpec& spec, const Grid& grid,
                         const std::vector<int64_t>& row_names = {});

// The same of the scales that (S1) gives `weights`, with which every search starts, naming the
// weight too; weights of `dead` features count as zeros. All are in their original order. Groups
// that follow another order are not known yet: then only weights that no group could hold are
// refused.
absl::Status CheckRange(const ResolvedSpec& spec, const StripMatrix& weights,
                        const std::vector<bool>& dead);

}  // namespace certiq::engine

#endif  // CERTIQ_ENGINE_SCALES_QPARAMS_H_
