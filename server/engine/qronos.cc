#include "engine/qronos.h"

#include <algorithm>
#include <cmath>
#include <utility>

#include "engine/aligned.h"
#include "engine/code_strip.h"
#include "engine/optq.h"
#include "engine/packed_block.h"
#include "engine/quadratic_form.h"
#include "engine/simd.h"
#include "engine/sweep_method.h"

namespace certiq::engine {
namespace {

constexpr int64_t kWidth = kStrip<double>;
// Covers the rounding of sums where a bound rests on an initial term alone.
constexpr double kOutward = 1 + 1e-6;

// Strips of one block of features, [strips][kPanelRows][kWidth].
AlignedVector<double> BlockProducts(const PackedBlock<double>& block, const double* x,
                                    int64_t features, int64_t strips) {
  AlignedVector<double> products(static_cast<size_t>(strips * kPanelRows * kWidth));
  block.AddProducts(strips, x, features * kWidth, products.data(), kPanelRows * kWidth);
  return products;
}

// U a = y in place for every row, last feature first. Fails only by cancellation.
absl::Status SolveUpper(const UpperPanels<double>& u, BasicStripMatrix<double>& x,
                        const RunContext& context) {
  PackedBlock<double> block(u.size());
  for (int64_t p = u.panels() - 1; p >= 0; --p) {
    if (context.cancelled()) return context.CancellationStatus();
    const int64_t after = u.end(p);
    block.Pack(u.size() - after, *context.executor, [&](int64_t k0, int64_t columns, double* to) {
      for (int64_t i = 0; i < kPanelRows; ++i) {
        double* out = to + i / kMicroRows * columns * kMicroRows + i % kMicroRows;
        const double* from =
            i < u.rows(p) ? u.panel(p) + i * u.stride(p) + u.rows(p) + k0 : nullptr;
        for (int64_t k = 0; k < columns; ++k) {
          out[k * kMicroRows] = from == nullptr ? 0 : from[k];
        }
      }
    });
    // Columns of the diagonal block.
    std::vector<double> diagonal(static_cast<size_t>(kPanelRows * kPanelRows));
    for (int64_t i = 0; i < u.rows(p); ++i) {
      for (int64_t j = i + 1; j < u.rows(p); ++j) {
        diagonal[static_cast<size_t>(j * kPanelRows + i)] = u.row(u.begin(p) + i)[j - i];
      }
    }
    ForTiles(x.strips(), *context.executor, [&](int64_t first, int64_t last) {
      const AlignedVector<double> products =
          BlockProducts(block, x.strip(first) + after * kWidth, u.size(), last - first);
      for (int64_t s = first; s < last; ++s) {
        double* strip = x.strip(s);
        const double* product = products.data() + (s - first) * kPanelRows * kWidth;
        double* x_p = strip + u.begin(p) * kWidth;
        for (int64_t i = 0; i < u.rows(p) * kWidth; ++i) x_p[i] -= product[i];
        // A feature that is done tells those before it: sums that do not wait for one another.
        for (int64_t j = u.rows(p) - 1; j > 0; --j) {
          const double* from = x_p + j * kWidth;
          for (int64_t i = 0; i < j; ++i) {
            const double scalar = diagonal[static_cast<size_t>(j * kPanelRows + i)];
            for (int64_t c = 0; c < kWidth; ++c) x_p[i * kWidth + c] -= scalar * from[c];
          }
        }
      }
    });
  }
  return absl::OkStatus();
}

// U^T z = b in place for every row, first feature first. Fails only by cancellation.
absl::Status SolveLower(const UpperPanels<double>& u, BasicStripMatrix<double>& x,
                        const RunContext& context) {
  PackedBlock<double> block(u.size());
  for (int64_t q = 0; q < u.panels(); ++q) {
    if (context.cancelled()) return context.CancellationStatus();
    const int64_t begin = u.begin(q);
    block.Pack(begin, *context.executor, [&](int64_t k0, int64_t columns, double* to) {
      for (int64_t k = 0; k < columns; ++k) {
        const double* from = &u.at(k0 + k, begin);
        for (int64_t j = 0; j < kPanelRows; ++j) {
          to[(j / kMicroRows * columns + k) * kMicroRows + j % kMicroRows] =
              j < u.rows(q) ? from[j] : 0;
        }
      }
    });
    ForTiles(x.strips(), *context.executor, [&](int64_t first, int64_t last) {
      const AlignedVector<double> products =
          BlockProducts(block, x.strip(first), u.size(), last - first);
      for (int64_t s = first; s < last; ++s) {
        double* strip = x.strip(s) + begin * kWidth;
        const double* product = products.data() + (s - first) * kPanelRows * kWidth;
        for (int64_t i = 0; i < u.rows(q) * kWidth; ++i) strip[i] -= product[i];
        for (int64_t i = 0; i < u.rows(q); ++i) {
          const double* row = u.row(begin + i);
          const double* from = strip + i * kWidth;
          for (int64_t j = i + 1; j < u.rows(q); ++j) {
            for (int64_t c = 0; c < kWidth; ++c) strip[j * kWidth + c] -= row[j - i] * from[c];
          }
        }
      }
    });
  }
  return absl::OkStatus();
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
  // A dead feature 0 has y_1 = 0; D_1 stands in for the zero of H_11 where lambda is 0.
  const double h11 = input.dead[0] ? factor.d[0] : input.statistics.gram.at(0, 0) + lambda;
  const int64_t rows = weights.rows();
  const int64_t n = weights.features();
  const UpperPanels<double>& u = factor.u;
  const std::vector<double>& d = factor.d;
  QronosStart start;
  BasicStripMatrix<double> y =
      input.spare_initial ? std::move(input.initial->cross) : input.initial->cross;
  const std::vector<double>& m = input.initial->squares;

  std::vector<double> first_weight(static_cast<size_t>(rows));
  std::vector<double> y1(first_weight.size());
  std::vector<double> v1(first_weight.size());
  for (int64_t r = 0; r < rows; ++r) {
    const auto at = static_cast<size_t>(r);
    first_weight[at] = weights.strip(r / kStripRows)[r % kStripRows];
    y1[at] = y.strip(r / kWidth)[r % kWidth];
    v1[at] = first_weight[at] + y1[at] / h11;
  }
  std::vector<float> q1;
  if (input.codes == nullptr) {
    q1 = FirstLevels(input.spec, grid, input.order, v1);
  } else {
    for (int64_t r = 0; r < rows; ++r) {
      q1.push_back(grid.Level(r, 0, (*input.codes)[static_cast<size_t>(r * n)]));
    }
  }

  start.targets = StripMatrix(rows, n);
  start.first_error.resize(first_weight.size());
  start.initial.resize(first_weight.size());
  start.prior_initial.resize(first_weight.size());
  start.floor.resize(first_weight.size());
  if (absl::Status solved = SolveUpper(u, y, context); !solved.ok()) return solved;
  context.executor->ParallelFor(y.strips(), [&](int64_t s) {
    double* x = y.strip(s);
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
    for (int64_t c = 0; c < live; ++c) {
      const auto r = static_cast<size_t>(first_row + c);
      start.first_error[r] = v1[r] - static_cast<double>(q1[r]);
      start.floor[r] = std::max(0.0, floor[c]);
      start.prior_initial[r] = std::max(0.0, prior[c]);
      start.initial[r] = std::max(0.0, actual[c]);
    }
  });
  if (absl::Status solved = SolveLower(u, y, context); !solved.ok()) return solved;
  context.executor->ParallelFor(y.strips(), [&](int64_t s) {
    const double* x = y.strip(s);
    const int64_t first_row = s * kWidth;
    const int64_t live = std::min(kWidth, rows - first_row);
    // A double strip is half a float strip.
    const float* w = weights.strip(first_row / kStripRows) + first_row % kStripRows;
    float* targets = start.targets.strip(first_row / kStripRows) + first_row % kStripRows;
    for (int64_t j = 1; j < n; ++j) {
      for (int64_t c = 0; c < live; ++c) {
        targets[j * kStripRows + c] =
            static_cast<float>(static_cast<double>(w[j * kStripRows + c]) + x[j * kWidth + c]);
      }
    }
    for (int64_t c = 0; c < live; ++c) targets[c] = q1[static_cast<size_t>(first_row + c)];
  });
  if (context.cancelled()) return context.CancellationStatus();
  start.first_target = std::move(v1);
  start.unchanged = m;
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
