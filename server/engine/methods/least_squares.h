// Least-squares correction of W for inputs that earlier quantization has changed (M5).

#ifndef CERTIQ_ENGINE_METHODS_LEAST_SQUARES_H_
#define CERTIQ_ENGINE_METHODS_LEAST_SQUARES_H_

#include <cstdint>
#include <vector>

#include "absl/status/statusor.h"
#include "engine/gram/gram.h"
#include "engine/gram/quadratic_form.h"
#include "engine/kernels/strip_matrix.h"
#include "engine/linalg/feedback_columns.h"
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

// w + z for every row of `weights`, z U = o the row of `offsets` (see SweepRules): from
// v_j = w_j + o_j + sum_{k<j} (w_k - q_k) U_kj follows v - (w + z) = -e U^-1 off its diagonal, for
// the least-squares weights w + z what (B6) says of W. Float32, R N^2 flops. Fails only by
// cancellation.
absl::Status AddLeastSquares(const FeedbackColumns& u, const StripMatrix& offsets,
                             StripMatrix& weights, const RunContext& context);

}  // namespace certiq::engine

#endif  // CERTIQ_ENGINE_METHODS_LEAST_SQUARES_H_
