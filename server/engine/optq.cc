#include "engine/optq.h"

namespace certiq::engine {

absl::StatusOr<Rounded> Optq(const ResolvedSpec& spec, const Factor& factor,
                             const std::vector<bool>& dead, const Grid& grid, StripMatrix& weights,
                             const RunContext& context) {
  std::vector<double> bound_d = factor.d;
  for (size_t j = 0; j < dead.size(); ++j) {
    if (dead[j]) bound_d[j] = 0;
  }
  const FeedbackColumns u(factor, *context.executor);
  return FeedbackSweep(spec, u, bound_d, grid, weights, context);
}

}  // namespace certiq::engine
