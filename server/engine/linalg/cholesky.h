// Blocked Cholesky factorisation H = U D U^T, in float64 or float32.

#ifndef CERTIQ_ENGINE_LINALG_CHOLESKY_H_
#define CERTIQ_ENGINE_LINALG_CHOLESKY_H_

#include <cstdint>
#include <optional>
#include <vector>

#include "absl/status/statusor.h"
#include "engine/kernels/upper_triangle.h"
#include "engine/run_context.h"

namespace certiq::engine {

// H, then U and D of (M1).
template <typename T>
struct CholeskyWork {
  UpperTriangle<T> u;
  std::vector<T> d;
};

// Where a factorisation stopped.
struct BadPivot {
  int64_t feature;
  double pivot;
};

// H = U D U^T (M1) in place, the upper triangle of H given in `work.u`; N^3/3 flops, blocked, the
// result does not depend on the executor. A pivot that is not positive and finite ends it. Fails
// only by cancellation. T is float or double.
template <typename T>
absl::StatusOr<std::optional<BadPivot>> FactorInPlace(CholeskyWork<T>& work,
                                                      const RunContext& context);

}  // namespace certiq::engine

#endif  // CERTIQ_ENGINE_LINALG_CHOLESKY_H_
