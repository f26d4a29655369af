// Objective of the scale searches: metric and linear term for the rules that look at more than
// weights.

#ifndef CERTIQ_ENGINE_SCALES_SCALE_OBJECTIVE_H_
#define CERTIQ_ENGINE_SCALES_SCALE_OBJECTIVE_H_

#include <optional>
#include <vector>

#include "absl/status/statusor.h"
#include "engine/gram/layer.h"
#include "engine/linalg/damped_factor.h"
#include "engine/scales/packed_metric.h"
#include "engine/scales/piso_layer.h"

namespace certiq::engine {

// Owns what its ScaleMetric points to.
//   COMPENSATED  diag(D) (S5), or, where there is no factor, the diagonal of X~^T X~.
//   PISO         by spec.scale_objective, with lambda I where the method is damped:
//     kInputs           X^T X + lambda I;
//     kQuantizedInputs  H = X~^T X~ + lambda I;
//     kMixed            H, and y = X~^T P w: |X w - X~ q|^2;
//     kDataFree         I.
class ScaleObjectiveTerms {
 public:
  // For the groups of `grid`. Costs what the metric takes to build, at most N^2, and for kMixed
  // with passes R N^2 flops. Fails by cancellation, and with INVALID_ARGUMENT where sums are not
  // finite.
  static absl::StatusOr<ScaleObjectiveTerms> Make(const ResolvedSpec& spec,
                                                  const WorkingLayer& layer,
                                                  const DampedFactor& damped, const Grid& grid,
                                                  const RunContext& context);

  // Groups from `searched` on are left to the sweep.
  ScaleMetric Metric(int64_t searched) const;
  // Null where the metric is diagonal.
  const PackedMetric* metric() const { return metric_.has_value() ? &*metric_ : nullptr; }
  // Improves the scales that FillQuantParams found by this metric.
  absl::Status Improve(const ResolvedSpec& spec, int64_t searched, const StripMatrix& weights,
                       const RunContext& context, Grid& grid) const;

  // Bytes that Make and Improve hold.
  static int64_t BytesFor(const ResolvedSpec& spec, int64_t rows, int64_t features,
                          bool mismatched);

 private:
  std::vector<double> diagonal_;
  std::optional<PackedMetric> metric_;
  std::optional<BasicStripMatrix<double>> linear_;
  SharedStatistics sums_;
  bool own_cross_ = false;
};

}  // namespace certiq::engine

#endif  // CERTIQ_ENGINE_SCALES_SCALE_OBJECTIVE_H_
