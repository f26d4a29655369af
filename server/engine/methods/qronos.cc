#include "engine/methods/qronos.h"

#include <algorithm>
#include <cmath>
#include <utility>
#include <vector>

#include "base/status_macros.h"
#include "engine/methods/least_squares.h"
#include "engine/methods/optq.h"

namespace certiq::engine {
namespace {

// Covers the rounding of sums where a bound rests on an initial term alone.
constexpr double kOutward = 1 + 1e-6;

// The initial error of W as it came: the layer's own where that is spare.
InitialError TakeInitial(const MethodInput& input) {
  return input.spare_initial ? std::move(*input.layer.initial) : *input.layer.initial;
}

}  // namespace

bool QronosNeedsInitialError(int64_t rows, int64_t features) { return 2 * rows <= features; }

absl::Status Qronos(const MethodInput& input, RoundedLayer& result, const RunContext& context) {
  const WorkingLayer& layer = input.layer;
  if (!layer.mismatched()) {
    RETURN_IF_ERROR(Optq(input, result, context));
    result.terms.emplace();
    return absl::OkStatus();
  }
  const Factor& factor = *result.damping->factor;
  const int64_t rows = result.grid.rows;
  const int64_t n = layer.weights().features();
  ASSIGN_OR_RETURN(LeastSquares solved,
                   QronosNeedsInitialError(rows, n)
                       ? SolveRowByRow(TakeInitial(input), factor, context)
                       : SolveTogether(layer.statistics(), layer.reference, factor, context));
  // A dead feature 0 has y_1 = a_1 = 0; D_1 stands in for the zero of H_11 where lambda is 0.
  const double h11 =
      layer.dead[0] ? factor.d[0] : layer.statistics().gram.at(0, 0) + result.damping->lambda_used;
  const double d1 = layer.dead[0] ? 0 : factor.d[0];
  const int64_t width = StripMatrix::StripRows();
  // The sweep may take W.
  std::vector<float> first_weight(static_cast<size_t>(rows));
  std::vector<float> first_offset(first_weight.size());
  FirstError first{d1, std::vector<double>(first_weight.size())};
  for (int64_t r = 0; r < rows; ++r) {
    const auto at = static_cast<size_t>(r);
    first_weight[at] = layer.weights().strip(r / width)[r % width];
    first_offset[at] = static_cast<float>(solved.first_product[at] / h11);
    solved.offsets.strip(r / width)[r % width] = first_offset[at];
    first.shift[at] = solved.first_solved[at] / factor.d[0];
  }

  const int64_t first_dynamic =
      input.spec.group_scales == GroupScales::kDynamic ? 1 : result.grid.groups;
  RETURN_IF_ERROR(
      RoundWithFeedback(input, first_dynamic, &solved.offsets, &first, result, context));

  result.damped.clear();
  result.initial.clear();
  InitialTerms& terms = result.terms.emplace();
  std::vector<double> prior_bound(first_weight.size());
  for (int64_t r = 0; r < rows; ++r) {
    const auto at = static_cast<size_t>(r);
    const float w1 = first_weight[at];
    const float q1 = result.grid.Level(r, 0, result.codes[static_cast<size_t>(r * n)]);
    const double best = first.shift[at];
    const double left = static_cast<double>(w1) - static_cast<double>(q1) + best;
    const double initial = solved.floor[at] + d1 * left * left;
    const double moved = best - solved.first_product[at] / h11;
    const double prior = solved.floor[at] + d1 * moved * moved;
    // epsilon_1 as the sweep has it for the others.
    const float v1 = w1 + first_offset[at];
    const float half = 0.5f * result.grid.scale[result.grid.At(r, 0)];
    const double eps = std::max(half, std::abs(v1 - q1)) + 0x1p-22f * std::abs(v1);
    result.damped.push_back(initial + result.rounding[at]);
    result.initial.push_back(std::sqrt(initial));
    prior_bound[at] = kOutward * std::sqrt(prior);
    result.bound[at] = std::sqrt(result.bound[at] + d1 * eps * eps);
    terms.qronos += prior;
    terms.optq += solved.unchanged[at];
    terms.floor += solved.floor[at];
  }
  for (size_t r = 0; r < prior_bound.size(); ++r) result.bound[r] += prior_bound[r];
  return absl::OkStatus();
}

}  // namespace certiq::engine
