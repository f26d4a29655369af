#include "engine/nearest.h"

#include <algorithm>

namespace certiq::engine {

StripMatrix NearestChange(const ResolvedSpec& spec, const Grid& grid, const StripMatrix& weights,
                          const RunContext& context) {
  StripMatrix change(weights.rows(), weights.features());
  const int64_t width = StripMatrix::StripRows();
  const auto lowest = static_cast<float>(grid.lowest_code);
  const auto highest = static_cast<float>(grid.highest_code);
  context.executor->ParallelFor(weights.strips(), [&](int64_t s) {
    const float* w = weights.strip(s);
    float* out = change.strip(s);
    for (int64_t c = 0; c < std::min(width, grid.rows - s * width); ++c) {
      for (int64_t j = 0; j < weights.features(); ++j) {
        const auto at = static_cast<size_t>((s * width + c) * grid.groups + spec.GroupOf(j));
        const auto zero = static_cast<float>(grid.zero[at]);
        const float value = w[j * width + c];
        const float code = std::clamp(FreeCode(value, grid.scale[at], zero), lowest, highest);
        out[j * width + c] = value - grid.scale[at] * (code - zero);
      }
    }
  });
  return change;
}

}  // namespace certiq::engine
