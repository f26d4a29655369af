#include "engine/sweep_method.h"

#include <utility>

#include "engine/alphabet.h"

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

std::vector<double> RowNorms(const StripMatrix& rows) {
  std::vector<double> norms(static_cast<size_t>(rows.rows()));
  const int64_t width = StripMatrix::StripRows();
  for (int64_t r = 0; r < rows.rows(); ++r) {
    const float* strip = rows.strip(r / width) + r % width;
    double sum = 0;
    for (int64_t j = 0; j < rows.features(); ++j) {
      const double value = strip[j * width];
      sum += value * value;
    }
    norms[static_cast<size_t>(r)] = sum;
  }
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
  const FeedbackColumns u(factor, *context.executor);
  const absl::StatusOr<std::vector<double>> moves =
      InverseColumnSums(input.spec, grid, u, input.dead, context);
  if (!moves.ok()) return moves.status();
  // Dynamic steps are known after the sweep only, and its start is gone then.
  const bool dynamic = first_dynamic_group < grid.groups;
  StripMatrix start = dynamic ? targets : StripMatrix();
  MethodOutput output;
  {
    StripMatrix& aims = dynamic ? start : targets;
    const std::vector<double> levels = ExchangeFirst(first_targets, aims);
    if (!dynamic) {
      output.bits_needed = BitsNeeded(input.spec, grid, *moves, aims, context);
      ExchangeFirst(levels, aims);
    }
  }

  SweepRules rules;
  rules.order = &input.order;
  rules.first_dynamic_group = first_dynamic_group;
  absl::StatusOr<Rounded> rounded =
      FeedbackSweep(input.spec, rules, u, LiveD(factor, input.dead), grid, targets, context);
  if (!rounded.ok()) return rounded.status();
  if (dynamic) output.bits_needed = BitsNeeded(input.spec, grid, *moves, start, context);

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
