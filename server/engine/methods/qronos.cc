#include "engine/methods/qronos.h"

#include <algorithm>
#include <cmath>
#include <utility>
#include <vector>

#include "engine/methods/least_squares.h"
#include "engine/methods/optq.h"
#include "engine/methods/sweep_method.h"

namespace certiq::engine {
namespace {

// Covers the rounding of sums where a bound rests on an initial term alone.
constexpr double kOutward = 1 + 1e-6;

// Of W as it came; where that is spare, its products are taken.
InitialError TakeInitial(const MethodInput& input) {
  return input.spare_initial ? std::move(*input.initial) : *input.initial;
}

}  // namespace

bool QronosNeedsInitialError(int64_t rows, int64_t features) { return 2 * rows <= features; }

absl::StatusOr<MethodOutput> Qronos(const MethodInput& input, const Factor& factor, double lambda,
                                    Grid& grid, const RunContext& context) {
  if (!input.statistics.mismatch.has_value()) {
    absl::StatusOr<MethodOutput> output = Optq(input, factor, lambda, grid, context);
    if (output.ok()) output->terms.emplace();
    return output;
  }
  absl::StatusOr<LeastSquares> solved =
      QronosNeedsInitialError(grid.rows, input.weights.features())
          ? SolveRowByRow(TakeInitial(input), factor, context)
          : SolveTogether(input.statistics, input.reference, factor, context);
  if (!solved.ok()) return solved.status();
  // A dead feature 0 has y_1 = a_1 = 0; D_1 stands in for the zero of H_11 where lambda is 0.
  const double h11 = input.dead[0] ? factor.d[0] : input.statistics.gram.at(0, 0) + lambda;
  const double d1 = input.dead[0] ? 0 : factor.d[0];
  const int64_t width = StripMatrix::StripRows();
  const int64_t n = input.weights.features();
  // The sweep may take W.
  std::vector<float> first_weight(static_cast<size_t>(grid.rows));
  std::vector<float> first_offset(first_weight.size());
  FirstError first{d1, std::vector<double>(first_weight.size())};
  for (int64_t r = 0; r < grid.rows; ++r) {
    const auto at = static_cast<size_t>(r);
    first_weight[at] = input.weights.strip(r / width)[r % width];
    first_offset[at] = static_cast<float>(solved->first_product[at] / h11);
    solved->offsets.strip(r / width)[r % width] = first_offset[at];
    first.shift[at] = solved->first_solved[at] / factor.d[0];
  }

  const int64_t first_dynamic = input.spec.group_scales == GroupScales::kDynamic ? 1 : grid.groups;
  absl::StatusOr<MethodOutput> output =
      Sweep(input, factor, first_dynamic, &solved->offsets, &first, grid, context);
  if (!output.ok()) return output;

  InitialTerms& terms = output->terms.emplace();
  for (int64_t r = 0; r < grid.rows; ++r) {
    const auto at = static_cast<size_t>(r);
    const float w1 = first_weight[at];
    const float q1 = grid.Level(r, 0, output->codes[static_cast<size_t>(r * n)]);
    const double best = first.shift[at];
    const double left = static_cast<double>(w1) - static_cast<double>(q1) + best;
    const double initial = solved->floor[at] + d1 * left * left;
    const double moved = best - solved->first_product[at] / h11;
    const double prior = solved->floor[at] + d1 * moved * moved;
    // epsilon_1 as the sweep has it for the others.
    const float v1 = w1 + first_offset[at];
    const float half = 0.5f * grid.scale[grid.At(r, 0)];
    const double eps = std::max(half, std::abs(v1 - q1)) + 0x1p-22f * std::abs(v1);
    output->damped.push_back(initial + output->rounding[at]);
    output->initial.push_back(std::sqrt(initial));
    output->bound[at] = kOutward * std::sqrt(prior) + std::sqrt(output->bound[at] + d1 * eps * eps);
    terms.qronos += prior;
    terms.optq += solved->unchanged[at];
    terms.floor += solved->floor[at];
  }
  return output;
}

}  // namespace certiq::engine
