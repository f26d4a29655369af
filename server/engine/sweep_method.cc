#include "engine/sweep_method.h"

#include <cmath>
#include <utility>

#include "engine/alphabet.h"
#include "engine/feedback_columns.h"
#include "engine/stopwatch.h"

namespace certiq::engine {

namespace {

// Puts values, one a row, into feature 0 and returns what was there; nothing for no values.
std::vector<double> ExchangeFirst(const std::vector<double>& values, StripMatrix& rows) {
  const int64_t width = StripMatrix::StripRows();
  std::vector<double> before;
  for (size_t r = 0; r < values.size(); ++r) {
    const auto at = static_cast<int64_t>(r);
    float& first = rows.strip(at / width)[at % width];
    before.push_back(first);
    first = static_cast<float>(values[r]);
  }
  return before;
}

}  // namespace

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
                                   int64_t first_dynamic_group,
                                   const std::vector<double>& first_targets, Grid& grid,
                                   StripMatrix targets, const RunContext& context) {
  const std::vector<double> d = LiveD(factor, input.dead);
  const FeedbackColumns u(factor, input.spare_factor, *context.executor);
  SweepRules rules;
  rules.order = &input.order;
  rules.first_dynamic_group = grid.groups;
  rules.codes = input.codes;
  if (input.codes == nullptr) {
    rules.first_dynamic_group = first_dynamic_group;
    rules.multipliers = TrialMultipliers(input.spec.scale_trials);
  }
  // Whether steps are known after the sweep only; its start is gone then.
  const bool new_steps =
      rules.first_dynamic_group < grid.groups || !rules.multipliers.empty();
  MethodOutput output;
  StripMatrix start = new_steps && input.certified ? targets : StripMatrix();
  std::vector<double> moves;
  if (input.certified) {
    const Stopwatch watch(input.seconds.certify, input.seconds.round);
    auto sums = InverseColumnSums(input.spec, grid, u, input.dead, context);
    if (!sums.ok()) return sums.status();
    moves = *std::move(sums);
    StripMatrix& aims = new_steps ? start : targets;
    const std::vector<double> levels = ExchangeFirst(first_targets, aims);
    if (!new_steps) {
      output.bits_needed = BitsNeeded(input.spec, grid, moves, aims, context);
      ExchangeFirst(levels, aims);
    }
  }

  absl::StatusOr<Rounded> rounded = FeedbackSweep(input.spec, rules, u, d, grid, targets, context);
  if (!rounded.ok()) return rounded.status();
  if (new_steps && input.certified) {
    const Stopwatch watch(input.seconds.certify, input.seconds.round);
    output.bits_needed = BitsNeeded(input.spec, grid, moves, start, context);
  }

  output.codes = std::move(rounded->codes);
  output.change = std::move(targets);
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
