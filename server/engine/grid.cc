#include "engine/grid.h"

#include <algorithm>
#include <cmath>
#include <limits>

#include "absl/strings/str_cat.h"
#include "engine/status.h"

namespace certiq::engine {
namespace {

struct Range {
  float low = 0;
  float high = 0;
};

float AbsmaxScale(const ResolvedSpec& spec, Range range) {
  const double levels = std::ldexp(1.0, spec.bits) - 1;
  const double low = range.low;
  const double high = range.high;
  const double span = spec.symmetric ? 2 * std::max(-low, high) : high - low;
  if (span == 0) return 1.0f;
  return RoundTo(spec.scale_dtype, static_cast<float>(span / levels));
}

}  // namespace

absl::StatusOr<Grid> AbsmaxGrid(const ResolvedSpec& spec, const StripMatrix& weights,
                                const RunContext& context) {
  const int64_t features = weights.features();
  Grid grid;
  grid.rows = weights.rows();
  grid.groups = spec.Groups(features);
  grid.highest_code = (1 << spec.bits) - 1;
  grid.scale.resize(static_cast<size_t>(grid.rows * grid.groups));
  grid.zero.resize(grid.scale.size());
  const int64_t width = StripMatrix::StripRows();

  context.executor->ParallelFor(weights.strips(), [&](int64_t s) {
    const float* strip = weights.strip(s);
    const int64_t live = std::min(width, grid.rows - s * width);
    std::vector<Range> ranges(static_cast<size_t>(grid.groups * width));
    for (int64_t j = 0; j < features; ++j) {
      Range* group = &ranges[static_cast<size_t>(spec.GroupOf(j) * width)];
      for (int64_t c = 0; c < width; ++c) {
        group[c].low = std::min(group[c].low, strip[j * width + c]);
        group[c].high = std::max(group[c].high, strip[j * width + c]);
      }
    }
    for (int64_t c = 0; c < live; ++c) {
      for (int64_t g = 0; g < grid.groups; ++g) {
        const Range range = ranges[static_cast<size_t>(g * width + c)];
        const size_t at = static_cast<size_t>((s * width + c) * grid.groups + g);
        const float scale = AbsmaxScale(spec, range);
        grid.scale[at] = scale;
        // The quotient may pass the top code by rounding of the scale.
        grid.zero[at] =
            spec.symmetric
                ? 1 << (spec.bits - 1)
                : static_cast<int32_t>(std::clamp(
                      std::nearbyint(-static_cast<double>(range.low) / static_cast<double>(scale)),
                      0.0, static_cast<double>(grid.highest_code)));
      }
    }
  });

  for (size_t at = 0; at < grid.scale.size(); ++at) {
    if (grid.scale[at] > 0 && std::isfinite(grid.scale[at])) continue;
    const auto groups = static_cast<size_t>(grid.groups);
    return InvalidField(
        "spec.scale_dtype",
        absl::StrCat("the scale of row ", at / groups, ", group ", at % groups, " does not fit ",
                     Name(spec.scale_dtype), ": it rounds to ", grid.scale[at]));
  }
  return grid;
}

}  // namespace certiq::engine
