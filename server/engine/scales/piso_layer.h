// PiSO over a layer: scales and zero points of all rows and groups under a full metric (S3, S4).

#ifndef CERTIQ_ENGINE_SCALES_PISO_LAYER_H_
#define CERTIQ_ENGINE_SCALES_PISO_LAYER_H_

#include <cstdint>
#include <limits>
#include <vector>

#include "absl/status/status.h"
#include "engine/kernels/strip_matrix.h"
#include "engine/run_context.h"
#include "engine/scales/packed_metric.h"
#include "engine/scales/piso_row.h"
#include "engine/scales/qparams.h"
#include "engine/spec.h"

namespace certiq::engine {

// What scales are judged by: (w - q)^T M (w - q) + 2 y^T (w - q) of every row, q by nearest
// rounding.
struct PisoObjective {
  // M, sorted by the grid's groups.
  const PackedMetric* metric = nullptr;
  // y, one row a row of W; null: zeros.
  const BasicStripMatrix<double>* linear = nullptr;
  // For independent groups in place of `linear`: y_g = K_gg^T w_g with K = P^T X~, row-major [N,
  // N].
  const std::vector<double>* cross = nullptr;
  // 0: every group by itself (independent, the diagonal block M_gg). Else passes of block
  // coordinate descent: each group given the codes of those before it, the others at their weights
  // on the first pass (sequential) and at their codes afterwards. Ends where a pass changes no
  // scale of a row.
  int32_t passes = 1;
  // Groups from this one on are left as they are.
  int64_t groups = std::numeric_limits<int64_t>::max();
};

// The best scale of one group for weights in the metric's order, with y = 0: never worse than
// `start`, which is returned as it is where the scale's type cannot hold it.
QuantParams PisoQuantParams(PisoRowSearch& search, const PackedMetric& metric, int64_t group,
                            int64_t count, const double* weights, QuantParams start);

// Replaces the scales of `grid`, which are what the search starts from, by the best of (S3). One
// group: they are globally optimal (PisoRowSearch), and passes are no matter. Groups: each scale of
// the descent is, and the objective never rises after the first pass. `weights` is W in working
// order. Rows are independent and results do not depend on the executor. Costs R N^2 levels
// multiply-adds for one group, R N (passes N + group_size levels) for groups. Holds at most
// PisoBytes beside `grid` and the metric. Fails only by cancellation.
absl::Status ImproveByPiso(const ResolvedSpec& spec, const PisoObjective& objective,
                           const StripMatrix& weights, const RunContext& context, Grid& grid);
int64_t PisoBytes(const ResolvedSpec& spec, int64_t features);

}  // namespace certiq::engine

#endif  // CERTIQ_ENGINE_SCALES_PISO_LAYER_H_
