// Bits that keep every weight unclipped, from how far error feedback can move targets (B6).

#ifndef CERTIQ_ENGINE_METHODS_REQUIRED_BITS_H_
#define CERTIQ_ENGINE_METHODS_REQUIRED_BITS_H_

#include <cstdint>
#include <optional>
#include <vector>

#include "absl/status/statusor.h"
#include "engine/kernels/strip_matrix.h"
#include "engine/linalg/feedback_columns.h"
#include "engine/run_context.h"
#include "engine/scales/qparams.h"
#include "engine/spec.h"

namespace certiq::engine {

// For every group g and feature j, the sum over k < j of group g of
// |(U^-1)_kj| (nearest rounding) or (U^-1)_kj^2 (stochastic): [groups][features]. Dead features
// are left out. Rows of U^-1 are computed a strip at a time in float32 and not kept: N^3/3
// flops, more where groups are not runs of features. Fails only by cancellation.
absl::StatusOr<std::vector<double>> InverseColumnSums(const ResolvedSpec& spec, const Grid& grid,
                                                      const FeedbackColumns& u,
                                                      const std::vector<bool>& dead,
                                                      const RunContext& context);

// The bits at which no weight would clip with the grid's scales (with the best whole zero points
// where the grid is asymmetric): targets stay within start +- m,
//   nearest     m_j = sum_k (delta_k / 2) |(U^-1)_kj|, always;
//   stochastic  m_j = sqrt(2 ln(2 R N / eps) sum_k delta_k^2 (U^-1)_kj^2 / 4), with probability
//               1 - eps, eps the spec's failure probability, for all weights at once.
// `start` is what targets are without any e: W, or for Qronos AddLeastSquares' result; empty
// `sums`: no feedback, m = 0. Empty where the number passes 31. Costs R N groups multiply-adds.
std::optional<int32_t> RequiredBits(const ResolvedSpec& spec, const Grid& grid,
                                    const std::vector<double>& sums, const StripMatrix& start,
                                    const RunContext& context);

}  // namespace certiq::engine

#endif  // CERTIQ_ENGINE_METHODS_REQUIRED_BITS_H_
