// PiSO against every scale there is, one group and many.

#include "engine/scales/piso_row.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <random>
#include <vector>

#include "engine/scales/diagonal_scale_search.h"
#include "engine/scales/piso_layer.h"
#include "tests/engine/problems.h"
#include "tests/engine/specs.h"
#include "tests/engine/zero_points.h"

namespace certiq::engine {
namespace {

using testing::ZeroPointRule;
using testing::ZeroPointSpec;

using Rows = PackedMetric::Rows;

// A row: weights, M = X^T X + shift (kept in float32 values, as the search keeps it), y.
struct Problem {
  std::vector<double> w;
  textbook::Matrix m;
  std::vector<double> y;
};

Problem MakeProblem(int64_t count, testing::Inputs inputs, bool mismatched, double shift,
                    uint64_t seed) {
  std::mt19937_64 random(seed);
  std::normal_distribution<double> gauss;
  Problem problem;
  const testing::RandomLayer layer = testing::MakeLayer(2 * count + 3, count, 1, inputs, seed);
  problem.m = textbook::Gram(layer.x);
  for (double& value : problem.m.values) value = static_cast<float>(value);
  problem.y.assign(static_cast<size_t>(count), 0);
  for (int64_t j = 0; j < count; ++j) {
    problem.w.push_back(layer.w.values[static_cast<size_t>(j)] + static_cast<float>(0.05 * shift));
    problem.w.back() = static_cast<float>(problem.w.back());
    if (!mismatched) continue;
    problem.y[static_cast<size_t>(j)] = 0.01 * problem.m(j, j) * gauss(random);
  }
  return problem;
}

// f at codes chosen by nearest rounding with scale and zero; infinite where a weight is at a tie.
double Error(const Problem& problem, double scale, int zero, int bits) {
  std::vector<double> change = problem.w;
  for (double& value : change) {
    const double position = value / scale;
    if (std::abs(position - std::floor(position) - 0.5) == 0) {
      return std::numeric_limits<double>::infinity();
    }
    value -=
        scale * std::clamp(std::nearbyint(position), -1.0 * zero, std::ldexp(1.0, bits) - 1 - zero);
  }
  double error = textbook::Form(change, problem.m, change);
  for (size_t j = 0; j < change.size(); ++j) error += 2 * problem.y[j] * change[j];
  return error;
}

// What errors are rounded relative to: |w|^T |M| |w| + 2 |y|^T |w|.
double Size(const Problem& problem) {
  double size = 0;
  for (int64_t i = 0; i < problem.m.rows; ++i) {
    for (int64_t j = 0; j < problem.m.rows; ++j) {
      size += std::abs(problem.m(i, j) * problem.w[static_cast<size_t>(i)] *
                       problem.w[static_cast<size_t>(j)]);
    }
    size += 2 * std::abs(problem.y[static_cast<size_t>(i)] * problem.w[static_cast<size_t>(i)]);
  }
  return size;
}

UpperTriangle<double> Panels(const textbook::Matrix& m) {
  UpperTriangle<double> panels(m.rows);
  for (int64_t i = 0; i < m.rows; ++i) {
    for (int64_t j = i; j < m.rows; ++j) panels.at(i, j) = m(i, j);
  }
  return panels;
}

struct Found {
  QuantParams step;
  double error = 0;
  int64_t crossings = 0;
};

// The search by itself, from a step that is far off.
Found Search(const Problem& problem, const ResolvedSpec& spec, QuantParams start = {1, 0}) {
  SerialExecutor serial;
  const auto n = static_cast<int64_t>(problem.w.size());
  const PackedMetric slices(Panels(problem.m), 0, std::vector<int32_t>(static_cast<size_t>(n), 0),
                            1, Rows::kAll, serial);
  PisoRowSearch search(spec);
  if (spec.symmetric) start.zero = search.first_zero();
  search.Begin(n, problem.w.data(), problem.y.data(), start);
  for (int64_t t = 0; t < slices.slices(0); ++t) search.Weigh(slices.own(0, t), t);
  search.Sort();
  for (int32_t zero = search.first_zero(); zero <= search.last_zero(); ++zero) {
    if (!search.Select(zero)) continue;
    for (int64_t t = 0; t < slices.slices(0); ++t) search.Stream(slices.own(0, t), t);
    search.Minimise();
  }
  return {search.best(), search.error(), search.crossings()};
}

// Half types have few enough scales to try them all.
TEST(PisoSearchTest, IsTheBestOfEveryScaleThatAHalfTypeHolds) {
  uint64_t seed = 0;
  for (const testing::Inputs inputs : {testing::Inputs::kGaussian, testing::Inputs::kCorrelated,
                                       testing::Inputs::kRankDeficient}) {
    for (const DType dtype : {DType::kF16, DType::kBF16}) {
      for (const int64_t count : {1, 2, 7, 33}) {
        for (const int bits : {2, 3, 4, 8}) {
          for (const ZeroPointRule rule :
               {ZeroPointRule::kSymmetric, ZeroPointRule::kSigned, ZeroPointRule::kAsymmetric}) {
            const bool symmetric = rule != ZeroPointRule::kAsymmetric;
            if (!symmetric && bits > 4) continue;
            for (const bool mismatched : {false, true}) {
              const ResolvedSpec spec = ZeroPointSpec(bits, rule, dtype);
              const Problem problem = MakeProblem(
                  count, inputs, mismatched, rule == ZeroPointRule::kSymmetric ? 0 : 0.5, ++seed);
              double largest = 0;
              for (const double w : problem.w) largest = std::max(largest, std::abs(w));
              double least = std::numeric_limits<double>::infinity();
              const double from = largest * std::ldexp(0.02, 2 - bits);
              for (double scale = RepresentableAbove(dtype, from); scale < 2.2 * largest;
                   scale = RepresentableAbove(dtype, scale * (1 + 1e-9))) {
                for (const int zero : testing::ZerosOf(spec)) {
                  least = std::min(least, Error(problem, scale, zero, bits));
                }
              }
              const Found found = Search(problem, spec);
              const double error = Error(problem, found.step.scale, found.step.zero, bits);
              const double slack = 1e-12 * Size(problem);
              EXPECT_LE(error, least + slack)
                  << count << " weights, " << bits << " bits, rule " << static_cast<int>(rule)
                  << ", mismatched " << mismatched << ", seed " << seed;
              EXPECT_NEAR(error, found.error, slack);
              EXPECT_EQ(RoundTo(dtype, found.step.scale), found.step.scale);
            }
          }
        }
      }
    }
  }
}

// float32 has too many: on each interval between breakpoints the least of the quadratic bounds what
// any scale there can give.
TEST(PisoSearchTest, IsTheGlobalMinimumOverAllScales) {
  uint64_t seed = 500;
  for (const int64_t count : {1, 3, 20}) {
    for (const int bits : {2, 3, 4}) {
      for (const ZeroPointRule rule :
           {ZeroPointRule::kSymmetric, ZeroPointRule::kSigned, ZeroPointRule::kAsymmetric}) {
        for (const bool mismatched : {false, true}) {
          const ResolvedSpec spec = ZeroPointSpec(bits, rule, DType::kF32);
          const Problem problem = MakeProblem(count, testing::Inputs::kCorrelated, mismatched,
                                              rule == ZeroPointRule::kSymmetric ? 0 : -0.6, ++seed);
          std::vector<double> breaks = {0};
          for (const double w : problem.w) {
            for (int t = 1; t < 1 << bits; ++t) breaks.push_back(std::abs(w) / (t - 0.5));
          }
          std::sort(breaks.begin(), breaks.end());
          double least = std::numeric_limits<double>::infinity();
          for (const int zero : testing::ZerosOf(spec)) {
            for (size_t i = 1; i < breaks.size(); ++i) {
              if (breaks[i] - breaks[i - 1] < 1e-6 * breaks[i]) continue;
              // Three values of a quadratic in the interval give its least.
              const double h = breaks[i] - breaks[i - 1];
              double f[3];
              for (int k = 0; k < 3; ++k) {
                f[k] = Error(problem, breaks[i - 1] + h * (0.01 + 0.49 * k), zero, bits);
              }
              const double bend = (f[0] - 2 * f[1] + f[2]) / 2;
              const double slope = (f[2] - f[0]) / 2;
              const double at =
                  bend > 0 ? std::clamp(-slope / (2 * bend), -1.0, 1.0) : (slope > 0 ? -1.0 : 1.0);
              least = std::min(least, f[1] + slope * at + bend * at * at);
            }
          }
          const Found found = Search(problem, spec);
          EXPECT_LE(Error(problem, found.step.scale, found.step.zero, bits),
                    least + 1e-7 * Size(problem))
              << count << " weights, " << bits << " bits, rule " << static_cast<int>(rule)
              << ", mismatched " << mismatched << ", seed " << seed;
        }
      }
    }
  }
}

TEST(PisoSearchTest, NoScaleOfADenseScanIsBetter) {
  for (const bool mismatched : {false, true}) {
    for (const int bits : {2, 4}) {
      const ResolvedSpec spec = ZeroPointSpec(bits, ZeroPointRule::kSymmetric, DType::kF32);
      const Problem problem =
          MakeProblem(150, testing::Inputs::kCorrelated, mismatched, 0, 900 + bits);
      const Found found = Search(problem, spec);
      const int zero = found.step.zero;
      const double error = Error(problem, found.step.scale, zero, bits);
      for (double factor = 0.2; factor < 4; factor *= 1.002) {
        ASSERT_LE(error,
                  Error(problem, found.step.scale * factor, zero, bits) + 1e-9 * Size(problem))
            << bits << " bits, " << factor << " times the scale";
      }
    }
  }
}

// The early stop must not cost the optimum (above), but it must stop.
TEST(PisoSearchTest, StopsBeforeTheLastBreakpoint) {
  const Problem problem = MakeProblem(200, testing::Inputs::kGaussian, false, 0, 3);
  const ResolvedSpec spec = ZeroPointSpec(4, ZeroPointRule::kSymmetric, DType::kF32);
  const std::vector<float> w(problem.w.begin(), problem.w.end());
  std::vector<double> diagonal;
  for (int64_t j = 0; j < 200; ++j) diagonal.push_back(problem.m(j, j));
  DiagonalScaleSearch start(spec);
  const Found found = Search(problem, spec, start.Find(w.data(), 200, DiagonalMetric(diagonal), 0));
  const Found whole = Search(problem, spec);
  EXPECT_LT(found.crossings, whole.crossings * 3 / 4);
  EXPECT_LE(found.error, whole.error + 1e-12 * Size(problem));
}

struct Layer {
  testing::RandomLayer layer;
  textbook::Matrix m;
  textbook::Matrix y;  // [rows, features]
  textbook::Matrix cross;
};

Layer MakeGroupLayer(int64_t features, int64_t rows, bool mismatched, uint64_t seed) {
  Layer layer;
  layer.layer =
      testing::MakeLayer(2 * features, features, rows, testing::Inputs::kCorrelated, seed);
  const textbook::Matrix seen =
      mismatched ? testing::Disturbed(layer.layer.x, 0.2, seed + 1) : layer.layer.x;
  layer.m = textbook::Gram(seen);
  for (double& value : layer.m.values) value = static_cast<float>(value);
  textbook::Matrix p = layer.layer.x;
  for (size_t i = 0; i < p.values.size(); ++i) p.values[i] -= seen.values[i];
  layer.cross = textbook::CrossGram(p, seen);
  layer.y = textbook::Matrix(rows, features);
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t j = 0; j < features; ++j) {
      for (int64_t i = 0; i < features; ++i) {
        layer.y(r, j) += layer.cross(i, j) * layer.layer.w(r, i);
      }
    }
  }
  return layer;
}

// The whole objective of a row on a grid.
double GridError(const Layer& layer, const Grid& grid, int64_t r) {
  Problem problem;
  problem.m = layer.m;
  problem.y = testing::Row(layer.y, r);
  std::vector<double> change = testing::Row(layer.layer.w, r);
  double error = 0;
  for (int64_t j = 0; j < layer.m.rows; ++j) {
    const size_t at = grid.At(r, j);
    const float code =
        std::clamp(FreeCode(static_cast<float>(change[static_cast<size_t>(j)]), grid.scale[at],
                            static_cast<float>(grid.zero[at])),
                   static_cast<float>(grid.lowest_code), static_cast<float>(grid.highest_code));
    change[static_cast<size_t>(j)] -= grid.Level(r, j, static_cast<int32_t>(code));
    error += 2 * problem.y[static_cast<size_t>(j)] * change[static_cast<size_t>(j)];
  }
  return error + textbook::Form(change, layer.m, change);
}

double GridSize(const Layer& layer, int64_t r) {
  return Size({testing::Row(layer.layer.w, r), layer.m, testing::Row(layer.y, r)});
}

TEST(PisoTest, MorePassesNeverRaiseTheObjectiveAndEndWhereNoGroupCanGain) {
  for (const bool mismatched : {false, true}) {
    for (const bool symmetric : {true, false}) {
      for (const Order order : {Order::kNatural, Order::kDecreasingNorm}) {
        const int64_t features = 70;
        const int64_t rows = 6;
        const Layer layer = MakeGroupLayer(features, rows, mismatched, 21);
        ResolvedSpec asked;
        asked.bits = 3;
        asked.symmetric = symmetric;
        asked.group_size = 16;
        asked.scale_dtype = DType::kF16;
        const ResolvedSpec spec = testing::Completed(asked);
        testing::ContraryExecutor threads;
        RunContext context;
        context.executor = &threads;
        // Groups that are no runs, as static groups in another order are.
        Grid start = MakeGrid(spec, rows, features, {});
        if (order == Order::kDecreasingNorm) {
          for (int64_t j = 0; j < features; ++j) {
            start.group_of[static_cast<size_t>(j)] = static_cast<int32_t>(j % start.groups);
          }
        }
        const StripMatrix weights = testing::Strips(layer.layer.w);
        FillQuantParams(spec, weights, context, start);
        const PackedMetric slices(Panels(layer.m), 0, start.group_of, start.groups, Rows::kAll,
                                  threads);
        BasicStripMatrix<double> linear(rows, features);
        for (int64_t r = 0; r < rows; ++r) linear.SetRow(r, testing::Row(layer.y, r).data());
        PisoObjective objective;
        objective.metric = &slices;
        objective.linear = &linear;
        std::vector<double> before(static_cast<size_t>(rows),
                                   std::numeric_limits<double>::infinity());
        for (const int32_t passes : {1, 2, 3, 30}) {
          objective.passes = passes;
          Grid grid = start;
          ASSERT_TRUE(ImproveByPiso(spec, objective, weights, context, grid).ok());
          for (int64_t r = 0; r < rows; ++r) {
            const double error = GridError(layer, grid, r);
            double& last = before[static_cast<size_t>(r)];
            EXPECT_LE(error, last + 1e-9 * GridSize(layer, r))
                << "row " << r << ", " << passes << " passes, mismatched " << mismatched;
            last = error;
          }
          if (passes < 30) continue;
          // At the end no scale of any one group is better.
          for (int64_t r = 0; r < rows; ++r) {
            for (int64_t g = 0; g < grid.groups; ++g) {
              Grid moved = grid;
              const auto at = static_cast<size_t>(r * grid.groups + g);
              for (double factor = 0.5; factor < 2; factor *= 1.01) {
                moved.scale[at] = RoundTo(DType::kF16, static_cast<float>(grid.scale[at] * factor));
                EXPECT_GE(GridError(layer, moved, r),
                          before[static_cast<size_t>(r)] - 1e-9 * GridSize(layer, r))
                    << "row " << r << ", group " << g << ", " << factor << " times the scale";
              }
            }
          }
        }
      }
    }
  }
}

// Independent groups are each PisoRowSearch on their own block.
TEST(PisoTest, IndependentGroupsSeeTheirOwnBlockAlone) {
  const int64_t features = 50;
  const Layer layer = MakeGroupLayer(features, 3, true, 33);
  ResolvedSpec asked;
  asked.group_size = 16;
  const ResolvedSpec spec = testing::Completed(asked);
  SerialExecutor serial;
  RunContext context;
  context.executor = &serial;
  const StripMatrix weights = testing::Strips(layer.layer.w);
  Grid grid = MakeGrid(spec, 3, features, {});
  FillQuantParams(spec, weights, context, grid);
  const Grid start = grid;
  const PackedMetric slices(Panels(layer.m), 0, grid.group_of, grid.groups, Rows::kOwn, serial);
  PisoObjective objective;
  objective.metric = &slices;
  objective.cross = &layer.cross.values;
  objective.passes = 0;
  ASSERT_TRUE(ImproveByPiso(spec, objective, weights, context, grid).ok());
  for (int64_t r = 0; r < 3; ++r) {
    for (int64_t g = 0; g < grid.groups; ++g) {
      const int64_t first = 16 * g;
      const int64_t size = std::min<int64_t>(16, features - first);
      Problem problem;
      problem.m = textbook::Matrix(size, size);
      for (int64_t i = 0; i < size; ++i) {
        problem.w.push_back(layer.layer.w(r, first + i));
        double y = 0;
        for (int64_t j = 0; j < size; ++j) {
          problem.m(i, j) = layer.m(first + i, first + j);
          y += layer.cross(first + j, first + i) * layer.layer.w(r, first + j);
        }
        problem.y.push_back(y);
      }
      const Found found = Search(problem, spec);
      const auto at = static_cast<size_t>(r * grid.groups + g);
      EXPECT_NEAR(grid.scale[at], found.step.scale, 1e-5 * found.step.scale);
      EXPECT_LE(Error(problem, grid.scale[at], grid.zero[at], 4),
                Error(problem, start.scale[at], start.zero[at], 4));
    }
  }
}

}  // namespace
}  // namespace certiq::engine
