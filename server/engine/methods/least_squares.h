// What least squares would add to W where earlier quantization has changed the inputs (M5).

#ifndef CERTIQ_ENGINE_METHODS_LEAST_SQUARES_H_
#define CERTIQ_ENGINE_METHODS_LEAST_SQUARES_H_

#include <cstdint>
#include <vector>

#include "absl/status/statusor.h"
#include "engine/gram/gram.h"
#include "engine/kernels/strip_matrix.h"
#include "engine/linalg/quadratic_form.h"
#include "engine/linalg/udu_factor.h"
#include "engine/run_context.h"

namespace certiq::engine {

// With y = X~^T P w and a = U^-1 y; vectors have one entry a row.
struct LeastSquares {
  // a_j / D_j [R, N].
  StripMatrix offsets;
  // y_1, a_1.
  std::vector<double> first_product;
  std::vector<double> first_solved;
  // |P w|^2, and what of it no weights remove: |P w|^2 - sum_j a_j^2 / D_j (M8).
  std::vector<double> unchanged;
  std::vector<double> floor;
};

// Row by row, all in float64: RN^2 flops from `initial`, whose products it consumes. REQUIRES: U of
// the sums that `initial` is of. Fails only by cancellation.
absl::StatusOr<LeastSquares> SolveRowByRow(InitialError initial, const Factor& factor,
                                           const RunContext& context);

// The same through D^-1 U^-1 X~^T P: N^3 flops in float64 and 3 R N^2 in float32. Rows whose floor
// would lose digits by that are solved row by row. REQUIRES: mismatched inputs. Fails only by
// cancellation.
absl::StatusOr<LeastSquares> SolveTogether(const Statistics& statistics, const StripMatrix& weights,
                                           const Factor& factor, const RunContext& context);

}  // namespace certiq::engine

#endif  // CERTIQ_ENGINE_METHODS_LEAST_SQUARES_H_
