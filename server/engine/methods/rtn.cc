#include "engine/methods/rtn.h"

#include <algorithm>
#include <cmath>
#include <mutex>

#include "engine/methods/round_column.h"

namespace certiq::engine {

NearestRounded RoundAlone(const ResolvedSpec& spec, const std::vector<int64_t>& order,
                          const Grid& grid, const std::vector<double>& feature_norms,
                          const StripMatrix& weights, const UnsetVector<uint8_t>* codes,
                          const RunContext& context) {
  const int64_t rows = weights.rows();
  const int64_t features = weights.features();
  NearestRounded result;
  result.codes.resize(static_cast<size_t>(rows * features));
  result.change = StripMatrix(rows, features);
  result.clipped.resize(static_cast<size_t>(rows));
  result.reach.resize(static_cast<size_t>(rows));
  result.width.resize(static_cast<size_t>(rows));
  std::mutex mutex;

  context.executor->ParallelFor(weights.strips(), [&](int64_t s) {
    const int64_t first = s * kStripRows;
    const int64_t live = std::min(kStripRows, rows - first);
    const StripGrid steps(grid, first);
    StripSums sums;
    double reach[kStripRows] = {};
    double width[kStripRows] = {};
    for (int64_t j = 0; j < features; ++j) {
      const float* v = weights.strip(s) + j * kStripRows;
      float* change = result.change.strip(s) + j * kStripRows;
      const int64_t group = grid.group_of[static_cast<size_t>(j)];
      float code[kStripRows];
      float level[kStripRows];
      if (codes != nullptr) {
        LoadCodes(*codes, features, first, j, steps, code);
      } else if (spec.rounding == Rounding::kNearest) {
        NearestCodes(steps, group, v, code);
      } else {
        StochasticCodes(steps, group, v, spec.seed, first,
                        order.empty() ? j : order[static_cast<size_t>(j)], code);
      }
      AddRounded(steps, group, spec.rounding, 0, v, code, level, sums);
      const double norm = feature_norms[static_cast<size_t>(j)];
      const float* scale = steps.scale.data() + group * kStripRows;
      for (int64_t c = 0; c < kStripRows; ++c) {
        change[c] = v[c] - level[c];
        const double eps =
            std::max(0.5 * static_cast<double>(scale[c]), std::abs(static_cast<double>(change[c])));
        reach[c] += eps * norm;
        if (norm > 0) width[c] += eps * eps;
      }
      for (int64_t c = 0; c < live; ++c) {
        result.codes[static_cast<size_t>((first + c) * features + j)] =
            static_cast<uint8_t>(static_cast<int32_t>(code[c]));
      }
    }
    double overshoot = 0;
    for (int64_t c = 0; c < live; ++c) {
      const auto r = static_cast<size_t>(first + c);
      result.clipped[r] = sums.clipped[c];
      result.reach[r] = reach[c];
      result.width[r] = width[c];
      overshoot = std::max(overshoot, static_cast<double>(sums.overshoot[c]));
    }
    const std::lock_guard<std::mutex> lock(mutex);
    result.worst_overshoot = std::max(result.worst_overshoot, overshoot);
  });
  return result;
}

}  // namespace certiq::engine
