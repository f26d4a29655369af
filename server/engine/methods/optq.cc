#include "engine/methods/optq.h"

#include <cmath>
#include <utility>

#include "engine/linalg/quadratic_form.h"
#include "engine/methods/sweep_method.h"

namespace certiq::engine {

absl::StatusOr<MethodOutput> Optq(const MethodInput& input, const Factor& factor, double lambda,
                                  Grid& grid, const RunContext& context) {
  const int64_t first_dynamic = input.spec.group_scales == GroupScales::kDynamic ? 0 : grid.groups;
  absl::StatusOr<MethodOutput> output =
      Sweep(input, factor, first_dynamic, nullptr, nullptr, grid, context);
  if (!output.ok()) return output;
  for (double& bound : output->bound) bound = std::sqrt(bound);
  if (!input.statistics.mismatch.has_value()) {
    output->damped = output->rounding;
    return output;
  }

  auto errors = SquaredErrors(input.statistics, input.reference, output->change, input.initial,
                              Phase::kRound, context);
  if (!errors.ok()) return errors.status();
  output->initial = Roots(input.initial->squares);
  output->damped = *std::move(errors);
  const std::vector<double> norms = RowNorms(output->change, *context.executor);
  InitialTerms& terms = output->terms.emplace();
  for (size_t r = 0; r < norms.size(); ++r) {
    output->damped[r] += lambda * norms[r];
    output->bound[r] += (1 + 1e-6) * output->initial[r];
    terms.optq += input.initial->squares[r];
  }
  return output;
}

}  // namespace certiq::engine
