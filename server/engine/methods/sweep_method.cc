#include "engine/methods/sweep_method.h"

#include <cmath>
#include <utility>

#include "base/stopwatch.h"
#include "engine/certify/required_bits.h"
#include "engine/linalg/feedback_columns.h"

namespace certiq::engine {

std::vector<double> Roots(const std::vector<double>& squares) {
  std::vector<double> roots = squares;
  for (double& root : roots) root = std::sqrt(root);
  return roots;
}

std::vector<double> RowNorms(const StripMatrix& rows, Executor& executor) {
  const int64_t width = StripMatrix::StripRows();
  std::vector<double> norms(static_cast<size_t>(rows.strips() * width));
  executor.ParallelFor(rows.strips(), [&](int64_t s) {
    const float* strip = rows.strip(s);
    double* sums = norms.data() + s * width;
    for (int64_t j = 0; j < rows.features(); ++j) {
      for (int64_t c = 0; c < width; ++c) {
        const double value = strip[j * width + c];
        sums[c] += value * value;
      }
    }
  });
  norms.resize(static_cast<size_t>(rows.rows()));
  return norms;
}

std::vector<double> LiveD(const Factor& factor, const std::vector<bool>& dead) {
  std::vector<double> d = factor.d;
  for (size_t j = 0; j < dead.size(); ++j) {
    if (dead[j]) d[j] = 0;
  }
  return d;
}

absl::StatusOr<MethodOutput> Sweep(const MethodInput& input, const Factor& factor,
                                   int64_t first_dynamic_group, const StripMatrix* offsets,
                                   const FirstError* first, Grid& grid, const RunContext& context) {
  StripMatrix weights = input.spare_weights != nullptr
                            ? StripMatrix(std::move(*input.spare_weights))
                            : Copy(input.weights, *context.executor);
  std::vector<double> d = LiveD(factor, input.dead);
  if (offsets != nullptr) d[0] = 0;
  const FeedbackColumns u(factor, input.spare_factor, *context.executor);
  SweepRules rules;
  rules.order = &input.order;
  rules.first_dynamic_group = grid.groups;
  rules.codes = input.codes;
  if (input.codes == nullptr) {
    rules.first_dynamic_group = first_dynamic_group;
    rules.multipliers = TrialMultipliers(input.spec.scale_trials);
  }
  rules.offsets = offsets;
  rules.first = first;
  rules.steps = input.steps;
  const bool new_steps = rules.first_dynamic_group < grid.groups || !rules.multipliers.empty();
  MethodOutput output;
  // W and, with offsets, the least-squares correction: what the sweep aims at.
  StripMatrix start;
  const bool corrected_steps = offsets != nullptr && input.steps != nullptr &&
                               rules.first_dynamic_group == grid.groups && input.codes == nullptr;
  if (offsets != nullptr && (input.certified || corrected_steps)) {
    start = Copy(weights, *context.executor);
    if (absl::Status added = AddLeastSquares(u, *offsets, start, context); !added.ok()) {
      return added;
    }
  }
  if (corrected_steps) {
    FillSteps(input.spec, start, context, grid, *input.steps);
    if (context.cancelled()) return context.CancellationStatus();
    if (absl::Status status = CheckScales(input.spec, grid); !status.ok()) return status;
  }
  std::vector<double> moves;
  if (input.certified) {
    const base::Stopwatch watch(input.seconds.certify, input.seconds.round);
    auto sums = InverseColumnSums(input.spec, grid, u, input.dead, context);
    if (!sums.ok()) return sums.status();
    moves = *std::move(sums);
    // Steps that are known after the sweep only; what it starts from is gone then.
    if (new_steps && offsets == nullptr) start = Copy(weights, *context.executor);
    if (!new_steps) {
      output.bits_needed =
          BitsNeeded(input.spec, grid, moves, offsets != nullptr ? start : weights, context);
      start = StripMatrix();
    }
  }

  absl::StatusOr<Rounded> rounded = FeedbackSweep(input.spec, rules, u, d, grid, weights, context);
  if (!rounded.ok()) return rounded.status();
  if (new_steps && input.certified) {
    const base::Stopwatch watch(input.seconds.certify, input.seconds.round);
    output.bits_needed = BitsNeeded(input.spec, grid, moves, start, context);
  }

  output.codes = std::move(rounded->codes);
  output.change = std::move(weights);
  output.rounding = std::move(rounded->damped);
  output.bound = std::move(rounded->bound);
  output.clipped = std::move(rounded->clipped);
  output.worst_overshoot = rounded->worst_overshoot;
  if (input.spec.rounding == Rounding::kStochastic) {
    output.widest = std::move(rounded->widest);
    output.clipped_reach = std::move(rounded->clipped_reach);
  }
  return output;
}

}  // namespace certiq::engine
