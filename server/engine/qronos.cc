#include "engine/qronos.h"

#include <algorithm>
#include <cmath>
#include <utility>

#include "engine/code_strip.h"
#include "engine/optq.h"
#include "engine/quadratic_form.h"
#include "engine/simd.h"
#include "engine/sweep_method.h"

namespace certiq::engine {
namespace {

constexpr int64_t kWidth = kStrip<double>;
constexpr int64_t kDepth = 256;
// Covers the rounding of sums where a bound rests on an initial term alone.
constexpr double kOutward = 1 + 1e-6;

// U a = y in place, last feature first; `x` is a strip [N][kWidth].
void SolveUpper(const UpperPanels<double>& u, double* x) {
  std::vector<double> sum(static_cast<size_t>(kPanelRows * kWidth));
  for (int64_t p = u.panels() - 1; p >= 0; --p) {
    std::fill(sum.begin(), sum.end(), 0.0);
    const int64_t after = u.end(p);
    for (int64_t k0 = after; k0 < u.size(); k0 += kDepth) {
      MultiplyIntoStrip(u.rows(p), std::min(kDepth, u.size() - k0), u.panel(p) + (k0 - u.begin(p)),
                        int64_t{1}, u.stride(p), x + k0 * kWidth, sum.data());
    }
    for (int64_t i = u.end(p) - 1; i >= u.begin(p); --i) {
      const double* row = u.row(i);
      double* to = x + i * kWidth;
      const double* before = sum.data() + (i - u.begin(p)) * kWidth;
      for (int64_t c = 0; c < kWidth; ++c) to[c] -= before[c];
      for (int64_t j = i + 1; j < after; ++j) {
        for (int64_t c = 0; c < kWidth; ++c) to[c] -= row[j - i] * x[j * kWidth + c];
      }
    }
  }
}

// U^T z = b in place, first feature first.
void SolveLower(const UpperPanels<double>& u, double* x) {
  std::vector<double> sum(static_cast<size_t>(kPanelRows * kWidth));
  for (int64_t p = 0; p < u.panels(); ++p) {
    for (int64_t i = u.begin(p); i < u.end(p); ++i) {
      const double* row = u.row(i);
      const double* from = x + i * kWidth;
      for (int64_t j = i + 1; j < u.end(p); ++j) {
        for (int64_t c = 0; c < kWidth; ++c) x[j * kWidth + c] -= row[j - i] * from[c];
      }
    }
    for (int64_t q = p + 1; q < u.panels(); ++q) {
      std::fill(sum.begin(), sum.end(), 0.0);
      MultiplyIntoStrip(u.rows(q), u.rows(p), u.panel(p) + (u.begin(q) - u.begin(p)), u.stride(p),
                        int64_t{1}, x + u.begin(p) * kWidth, sum.data());
      double* to = x + u.begin(q) * kWidth;
      for (int64_t i = 0; i < u.rows(q) * kWidth; ++i) to[i] -= sum[static_cast<size_t>(i)];
    }
  }
}

// The level of feature 0 for every row, from its targets.
std::vector<float> FirstLevels(const ResolvedSpec& spec, const Grid& grid,
                               const std::vector<int64_t>& order,
                               const std::vector<double>& targets) {
  std::vector<float> levels(targets.size());
  const int64_t column = order.empty() ? 0 : order[0];
  const int32_t group = grid.group_of[0];
  for (int64_t first = 0; first < grid.rows; first += kStripRows) {
    const StripGrid steps(grid, first);
    const int64_t live = std::min(kStripRows, grid.rows - first);
    float v[kStripRows] = {};
    float code[kStripRows];
    for (int64_t c = 0; c < live; ++c) {
      v[c] = static_cast<float>(targets[static_cast<size_t>(first + c)]);
    }
    if (spec.rounding == Rounding::kNearest) {
      NearestCodes(steps, group, v, code);
    } else {
      StochasticCodes(steps, group, v, spec.seed, first, column, code);
    }
    for (int64_t c = 0; c < live; ++c) {
      levels[static_cast<size_t>(first + c)] =
          grid.Level(first + c, 0, static_cast<int32_t>(code[c]));
    }
  }
  return levels;
}

// How far v_1 of row r clipped, in steps, as the sweep counts; 0 if it did not. `halves` is
// |e_1| in half steps.
double FirstOvershoot(const ResolvedSpec& spec, const Grid& grid, int64_t r, double target,
                      double halves) {
  if (spec.rounding == Rounding::kNearest) {
    return halves > 1 + 1e-6 ? 0.5 * (halves - 1) : 0;
  }
  const size_t at = grid.At(r, 0);
  const double position = target / static_cast<double>(grid.scale[at]) + grid.zero[at];
  const double beyond = std::max(grid.lowest_code - position, position - grid.highest_code);
  return beyond > 1e-6 ? beyond : 0;
}

}  // namespace

absl::StatusOr<QronosStart> StartQronos(const MethodInput& input, const Factor& factor,
                                        double lambda, const Grid& grid,
                                        const RunContext& context) {
  const StripMatrix& weights = input.weights;
  const MismatchSums& mismatch = *input.statistics.mismatch;
  // A dead feature 0 has y_1 = 0; D_1 stands in for the zero of H_11 where lambda is 0.
  const double h11 = input.dead[0] ? factor.d[0] : input.statistics.gram.at(0, 0) + lambda;
  const int64_t rows = weights.rows();
  const int64_t n = weights.features();
  const UpperPanels<double>& u = factor.u;
  const std::vector<double>& d = factor.d;
  QronosStart start;
  BasicStripMatrix<double> y;
  std::vector<double> m;
  {
    const BasicStripMatrix<double> wide = Widen(input.reference, *context.executor);
    auto forms = QuadraticForms(mismatch.residual, wide, Phase::kRound, context);
    if (!forms.ok()) return forms.status();
    m = *std::move(forms);
    auto product = TimesSquare(wide, mismatch.cross, Phase::kRound, context);
    if (!product.ok()) return product.status();
    y = *std::move(product);
  }

  std::vector<double> first_weight(static_cast<size_t>(rows));
  std::vector<double> y1(first_weight.size());
  std::vector<double> v1(first_weight.size());
  for (int64_t r = 0; r < rows; ++r) {
    const auto at = static_cast<size_t>(r);
    first_weight[at] = weights.strip(r / kStripRows)[r % kStripRows];
    y1[at] = y.strip(r / kWidth)[r % kWidth];
    v1[at] = first_weight[at] + y1[at] / h11;
  }
  const std::vector<float> q1 = FirstLevels(input.spec, grid, input.order, v1);

  start.targets = StripMatrix(rows, n);
  start.first_error.resize(first_weight.size());
  start.initial.resize(first_weight.size());
  start.prior_initial.resize(first_weight.size());
  start.floor.resize(first_weight.size());
  context.executor->ParallelFor(y.strips(), [&](int64_t s) {
    if (context.cancelled()) return;
    double* x = y.strip(s);
    SolveUpper(u, x);
    const int64_t first_row = s * kWidth;
    const int64_t live = std::min(kWidth, rows - first_row);
    double t[kWidth] = {};
    double best[kWidth] = {};
    double floor[kWidth] = {};
    double prior[kWidth] = {};
    double actual[kWidth] = {};
    for (int64_t c = 0; c < live; ++c) {
      const auto r = static_cast<size_t>(first_row + c);
      t[c] = first_weight[r] - static_cast<double>(q1[r]);
      best[c] = -y1[r] / h11;
      floor[c] = m[r] - x[c] * x[c] / d[0];
      prior[c] = m[r] - y1[r] * y1[r] / h11;
      actual[c] = m[r] + 2 * y1[r] * t[c] + h11 * t[c] * t[c];
    }
    // H_21 = U_22 D_2 U_12^T: U_22^-1 H_21 is D_j U_1j.
    const double* first_row_of_u = u.row(0);
    for (int64_t j = 1; j < n; ++j) {
      const double h = d[static_cast<size_t>(j)] * first_row_of_u[j];
      double* a = x + j * kWidth;
      for (int64_t c = 0; c < kWidth; ++c) {
        const double at_best = a[c] + best[c] * h;
        const double at_q1 = a[c] + t[c] * h;
        floor[c] -= a[c] * a[c] / d[static_cast<size_t>(j)];
        prior[c] -= at_best * at_best / d[static_cast<size_t>(j)];
        actual[c] -= at_q1 * at_q1 / d[static_cast<size_t>(j)];
        a[c] = at_q1 / d[static_cast<size_t>(j)];
      }
    }
    std::fill_n(x, kWidth, 0.0);
    SolveLower(u, x);
    // A double strip is half a float strip.
    const float* w = weights.strip(first_row / kStripRows) + first_row % kStripRows;
    float* targets = start.targets.strip(first_row / kStripRows) + first_row % kStripRows;
    for (int64_t j = 1; j < n; ++j) {
      for (int64_t c = 0; c < live; ++c) {
        targets[j * kStripRows + c] =
            static_cast<float>(static_cast<double>(w[j * kStripRows + c]) + x[j * kWidth + c]);
      }
    }
    for (int64_t c = 0; c < live; ++c) {
      const auto r = static_cast<size_t>(first_row + c);
      targets[c] = q1[r];
      start.first_error[r] = v1[r] - static_cast<double>(q1[r]);
      start.floor[r] = std::max(0.0, floor[c]);
      start.prior_initial[r] = std::max(0.0, prior[c]);
      start.initial[r] = std::max(0.0, actual[c]);
    }
  });
  if (context.cancelled()) return context.CancellationStatus();
  start.first_target = std::move(v1);
  start.unchanged = std::move(m);
  return start;
}

absl::StatusOr<MethodOutput> Qronos(const MethodInput& input, const Factor& factor, double lambda,
                                    Grid& grid, const RunContext& context) {
  if (!input.statistics.mismatch.has_value()) {
    absl::StatusOr<MethodOutput> output = Optq(input, factor, lambda, grid, context);
    if (output.ok()) output->terms.emplace();
    return output;
  }
  absl::StatusOr<QronosStart> start = StartQronos(input, factor, lambda, grid, context);
  if (!start.ok()) return start.status();
  const int64_t first_dynamic = input.spec.group_scales == GroupScales::kDynamic ? 1 : grid.groups;
  absl::StatusOr<MethodOutput> output = Sweep(input, factor, first_dynamic, start->first_target,
                                              grid, std::move(start->targets), context);
  if (!output.ok()) return output;

  // The sweep left targets minus levels; the error counts from W.
  const int64_t n = input.weights.features();
  context.executor->ParallelFor(output->change.strips(), [&](int64_t s) {
    float* change = output->change.strip(s);
    const float* w = input.weights.strip(s);
    for (int64_t c = 0; c < kStripRows; ++c) {
      const int64_t r = s * kStripRows + c;
      if (r >= grid.rows) break;
      for (int64_t j = 0; j < n; ++j) {
        const int32_t code = output->codes[static_cast<size_t>(r * n + j)];
        change[j * kStripRows + c] = w[j * kStripRows + c] - grid.Level(r, j, code);
      }
    }
  });

  InitialTerms& terms = output->terms.emplace();
  for (int64_t r = 0; r < grid.rows; ++r) {
    const auto at = static_cast<size_t>(r);
    // Feature 0 came to the sweep rounded: its sum has delta_1 / 2 in place of eps_1.
    if (!input.dead[0]) {
      const double half = 0.5 * static_cast<double>(grid.scale[grid.At(r, 0)]);
      const double eps = std::max(half, std::abs(start->first_error[at]));
      output->bound[at] += (eps * eps - half * half) * factor.d[0];
      const double beyond =
          FirstOvershoot(input.spec, grid, r, start->first_target[at], eps / half);
      if (beyond > 0) {
        ++output->clipped[at];
        output->worst_overshoot = std::max(output->worst_overshoot, beyond);
      }
    }
    output->bound[at] =
        kOutward * std::sqrt(start->prior_initial[at]) + std::sqrt(output->bound[at]);
    output->damped.push_back(start->initial[at] + output->rounding[at]);
    output->initial.push_back(std::sqrt(start->initial[at]));
    terms.qronos += start->prior_initial[at];
    terms.optq += start->unchanged[at];
    terms.floor += start->floor[at];
  }
  return output;
}

}  // namespace certiq::engine
