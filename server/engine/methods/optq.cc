#include "engine/methods/optq.h"

#include <cmath>
#include <utility>
#include <vector>

#include "base/status_macros.h"
#include "base/stopwatch.h"
#include "engine/gram/quadratic_form.h"
#include "engine/linalg/feedback_columns.h"
#include "engine/methods/least_squares.h"
#include "engine/methods/required_bits.h"

namespace certiq::engine {

absl::Status RoundWithFeedback(const MethodInput& input, int64_t first_dynamic_group,
                               const StripMatrix* offsets, const FirstError* first,
                               RoundedLayer& result, const RunContext& context) {
  WorkingLayer& layer = input.layer;
  const Factor& factor = *result.damping->factor;
  StripMatrix& own = layer.zeroed.rows() > 0 ? layer.zeroed : layer.reference;
  StripMatrix weights =
      input.spare_weights ? StripMatrix(std::move(own)) : Copy(own, *context.executor);
  std::vector<double> d = LiveD(factor, layer.dead);
  if (offsets != nullptr) d[0] = 0;
  const FeedbackColumns u(factor, input.spare_factor, *context.executor);
  SweepRules rules;
  rules.order = &layer.order;
  rules.first_dynamic_group = result.grid.groups;
  rules.codes = input.codes;
  if (input.codes == nullptr) {
    rules.first_dynamic_group = first_dynamic_group;
    rules.multipliers = TrialMultipliers(input.spec.scale_trials);
  }
  rules.offsets = offsets;
  rules.first = first;
  rules.metric = input.metric;
  const bool new_scales =
      rules.first_dynamic_group < result.grid.groups || !rules.multipliers.empty();
  // W and, with offsets, the least-squares correction: what the sweep aims at.
  StripMatrix start;
  const bool corrected_scales = offsets != nullptr && input.metric != nullptr &&
                                rules.first_dynamic_group == result.grid.groups &&
                                input.codes == nullptr;
  if (offsets != nullptr && (input.certified || corrected_scales)) {
    start = Copy(weights, *context.executor);
    RETURN_IF_ERROR(AddLeastSquares(u, *offsets, start, context));
  }
  if (corrected_scales) {
    FillQuantParams(input.spec, start, context, result.grid, *input.metric);
    if (context.cancelled()) return context.CancellationStatus();
    RETURN_IF_ERROR(CheckScales(input.spec, result.grid, layer.row_names));
  }
  std::vector<double> moves;
  if (input.certified) {
    const base::Stopwatch watch(input.seconds.certify, input.seconds.round);
    ASSIGN_OR_RETURN(moves, InverseColumnSums(input.spec, result.grid, u, layer.dead, context));
    // Scales that are known after the sweep only; what it starts from is gone then.
    if (new_scales && offsets == nullptr) start = Copy(weights, *context.executor);
    if (!new_scales) {
      result.bits_needed = RequiredBits(input.spec, result.grid, moves,
                                        offsets != nullptr ? start : weights, context);
      start = StripMatrix();
    }
  }

  RETURN_IF_ERROR(FeedbackSweep(input.spec, rules, u, d, weights, result, context));
  result.change = std::move(weights);
  if (new_scales && input.certified) {
    const base::Stopwatch watch(input.seconds.certify, input.seconds.round);
    result.bits_needed = RequiredBits(input.spec, result.grid, moves, start, context);
  }
  return absl::OkStatus();
}

absl::Status Optq(const MethodInput& input, RoundedLayer& result, const RunContext& context) {
  const WorkingLayer& layer = input.layer;
  const int64_t first_dynamic =
      input.spec.group_scales == GroupScales::kDynamic ? 0 : result.grid.groups;
  RETURN_IF_ERROR(RoundWithFeedback(input, first_dynamic, nullptr, nullptr, result, context));
  for (double& bound : result.bound) bound = std::sqrt(bound);
  if (!layer.mismatched()) {
    result.damped = result.rounding;
    return absl::OkStatus();
  }

  ASSIGN_OR_RETURN(result.damped, SquaredErrors(layer.statistics(), layer.reference, result.change,
                                                layer.initial_error(), Phase::kRound, context));
  result.initial = Roots(layer.initial->squares);
  const double lambda = result.damping->lambda_used;
  const std::vector<double> norms = RowNorms(result.change, *context.executor);
  InitialTerms& terms = result.terms.emplace();
  for (size_t r = 0; r < norms.size(); ++r) {
    result.damped[r] += lambda * norms[r];
    result.bound[r] += (1 + 1e-6) * result.initial[r];
    terms.optq += layer.initial->squares[r];
  }
  return absl::OkStatus();
}

}  // namespace certiq::engine
