// The blocked feedback sweep, shared by every method with error feedback.

#ifndef CERTIQ_ENGINE_ROUNDING_H_
#define CERTIQ_ENGINE_ROUNDING_H_

#include <cstdint>
#include <vector>

#include "absl/status/statusor.h"
#include "engine/factor.h"
#include "engine/grid.h"
#include "engine/run_context.h"
#include "engine/spec.h"
#include "engine/strip_matrix.h"

namespace certiq::engine {

// U of (M1) in float32, as the sweep reads it: block J of kPanelRows
// columns is a dense [end of J][kPanelRows] row-major matrix (k down, j
// across), padded with zero columns. The diagonal and what is below it is zero.
class FeedbackColumns {
 public:
  FeedbackColumns(const Factor& factor, Executor& executor);

  static int64_t BytesFor(int64_t features);
  int64_t features() const { return features_; }
  int64_t blocks() const { return static_cast<int64_t>(offsets_.size()) - 1; }
  // Element (k, j) of block b is block(b)[k * kPanelRows + j - b * kPanelRows].
  const float* block(int64_t b) const { return values_.data() + offsets_[b]; }

 private:
  int64_t features_;
  std::vector<int64_t> offsets_;
  std::vector<float> values_;
};

// What a sweep leaves behind. Sums are float64, one a row.
struct Rounded {
  // Row-major [rows, features].
  std::vector<uint8_t> codes;
  // sum_j e_j^2 D_j: the damped squared error of the row (M3).
  std::vector<double> damped;
  // sum_j eps_j^2 D_j, eps_j = max(delta_j / 2, |e_j|) widened by the rounding of v_j: (B1).
  std::vector<double> bound;
  // |w - q|^2.
  std::vector<double> change;
  // Weights outside the grid: |e_j| > (delta_j / 2)(1 + 1e-6).
  std::vector<int32_t> clipped;
  // max |e_j| / delta_j - 1/2 over those; 0 without.
  double worst_overshoot = 0;
};

// (M2) for every row: v_j = w_j + sum_{k<j} (w_k - q_k) U_kj, q_j the nearest
// level (ties to the even code), e_j = v_j - q_j, in float32. On return
// `weights` holds W - Q. `bound_d` is D with zeros for dead features, which
// take no part in the sums. Costs R N^2 flops: per block of columns one product with what came
// before it, then a triangular sweep inside the block. Rows are independent
// and results do not depend on the executor. Fails only by cancellation.
absl::StatusOr<Rounded> FeedbackSweep(const ResolvedSpec& spec, const FeedbackColumns& u,
                                      const std::vector<double>& bound_d, const Grid& grid,
                                      StripMatrix& weights, const RunContext& context);

}  // namespace certiq::engine

#endif  // CERTIQ_ENGINE_ROUNDING_H_
