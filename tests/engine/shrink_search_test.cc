// The shrink search (S2) against every step and zero point that it may choose.

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <random>
#include <string>
#include <vector>

#include "engine/scales/qparams.h"
#include "tests/engine/problems.h"
#include "tests/engine/zero_points.h"

namespace certiq::engine {
namespace {

using testing::ZeroPointRule;

// The exponent of (S2), and how far the engine's powers and float32 sums may be off: 1e-6 a power,
// 2^-24 for each of at most 40 additions, 2.4 times 2^-23 for a quotient.
constexpr double kExponent = 2.4;
constexpr double kAccuracy = 1e-5;

struct Shape {
  const char* name;
  // Weight j of `count`.
  double (*weight)(std::mt19937_64& random, int64_t j);
};

double Gauss(std::mt19937_64& random) { return std::normal_distribution<double>()(random); }

// Rows whose best zero point is not where the range has it, and rows where it is.
constexpr Shape kShapes[] = {
    {"TwoHeaps", [](std::mt19937_64&, int64_t j) { return j % 32 == 0 ? -1.0 : 0.9; }},
    {"TwoHeapsTurned", [](std::mt19937_64&, int64_t j) { return j % 32 == 0 ? 1.0 : -0.9; }},
    {"OneFarBelow",
     [](std::mt19937_64& random, int64_t j) { return j == 3 ? -6.0 : std::abs(Gauss(random)); }},
    {"TailAbove",
     [](std::mt19937_64& random, int64_t) { return std::exp(1.5 * Gauss(random)) - 1; }},
    {"Gaussian", [](std::mt19937_64& random, int64_t) { return Gauss(random); }},
    {"AllAbove", [](std::mt19937_64& random, int64_t) { return 2 + std::abs(Gauss(random)); }},
    {"AllBelow", [](std::mt19937_64& random, int64_t) { return -2 - std::abs(Gauss(random)); }},
    {"MostlyZero",
     [](std::mt19937_64& random, int64_t j) { return j % 9 == 0 ? Gauss(random) : 0.0; }},
};

double Loss(const std::vector<double>& w, double scale, int zero, int top) {
  double sum = 0;
  for (const double v : w) {
    const double code = std::clamp(std::nearbyint(v / scale) + zero, 0.0, double(top));
    sum += std::pow(std::abs(v - scale * (code - zero)), kExponent);
  }
  return sum;
}

// The least loss of steps that span p times the range, over all zero points that are allowed.
double LeastLoss(const ResolvedSpec& spec, const std::vector<double>& w) {
  double low = 0;
  double high = 0;
  for (const double v : w) {
    low = std::min(low, v);
    high = std::max(high, v);
  }
  const int top = (1 << spec.bits) - 1;
  double least = std::numeric_limits<double>::infinity();
  for (int percent = 100; percent > 20; --percent) {
    const double span = spec.symmetric ? 2 * std::max(-low, high) : high - low;
    const double scale =
        RoundTo(spec.scale_dtype, static_cast<float>(percent * span / (100.0 * top)));
    for (const int zero : testing::ZerosOf(spec)) {
      least = std::min(least, Loss(w, scale, zero, top));
    }
  }
  return least;
}

// What steps may differ by, as p [low, high] is rounded to float32 first: 2^-22 of the step moves a
// level by 2^-22 times its distance from zero, of which the outermost decide.
double Allowance(double scale, int top, int64_t count, double loss) {
  const double moved = top * scale * 0x1p-22;
  const double root = std::pow(loss / static_cast<double>(count), 1 / kExponent) + moved;
  return kAccuracy * loss +
         kExponent * static_cast<double>(count) * std::pow(root, kExponent - 1) * moved;
}

using Setting = std::tuple<int, ZeroPointRule>;
class ShrinkSearchTest : public ::testing::TestWithParam<Setting> {};

TEST_P(ShrinkSearchTest, NoStepAndZeroPointIsBetter) {
  const auto [bits, rule] = GetParam();
  for (const Shape& shape : kShapes) {
    for (const int64_t count : {1, 8, 33, 300}) {
      for (const DType dtype : {DType::kF32, DType::kF16}) {
        // Every pair for all lengths takes long where there are many zero points.
        if (bits > 6 && count == 300 && dtype == DType::kF16) continue;
        ResolvedSpec spec = testing::ZeroPointSpec(bits, rule, dtype);
        spec.scale = ScaleRule::kMse;
        std::mt19937_64 random(911);
        std::vector<double> w;
        for (int64_t j = 0; j < count; ++j) {
          w.push_back(static_cast<float>(shape.weight(random, j)));
        }
        const std::vector<float> values(w.begin(), w.end());
        const QuantParams found = FitQuantParams(spec, values.data(), count);
        const int top = (1 << bits) - 1;
        const double loss = Loss(w, found.scale, found.zero, top);
        const double least = LeastLoss(spec, w);
        ASSERT_LE(loss, least + Allowance(found.scale, top, count, least))
            << shape.name << ", " << count << " weights: scale " << found.scale << ", zero "
            << found.zero;
      }
    }
  }
}

INSTANTIATE_TEST_SUITE_P(Widths, ShrinkSearchTest,
                         ::testing::Combine(::testing::Values(2, 3, 4, 5, 6, 8),
                                            ::testing::Values(ZeroPointRule::kSymmetric,
                                                              ZeroPointRule::kSigned,
                                                              ZeroPointRule::kAsymmetric)));

// The zero point of the range leaves two levels for one weight of 32 and one for the others, which
// are more than a third of a step off it. Through the whole engine, for each layout of groups and
// method.
TEST(ShrinkSearchTest, LevelsLieWhereTheWeightsAre) {
  testing::RandomLayer problem = testing::MakeLayer(300, 64, 20, testing::Inputs::kGaussian, 919);
  for (int64_t r = 0; r < problem.w.rows; ++r) {
    for (int64_t j = 0; j < problem.w.cols; ++j) {
      problem.w(r, j) = static_cast<float>(j % 32 == 0 ? -1.0 : 0.9);
    }
  }
  for (const Method method : {Method::kNearest, Method::kOptq}) {
    for (const int group : {0, 32}) {
      for (const GroupScales layout : {GroupScales::kStatic, GroupScales::kDynamic}) {
        ResolvedSpec spec;
        spec.bits = 2;
        spec.symmetric = false;
        spec.method = method;
        spec.group_size = group;
        spec.group_scales = layout;
        spec.scale = ScaleRule::kMse;
        const auto searched = testing::Quantize(problem, spec);
        spec.scale = ScaleRule::kAbsmax;
        const auto range = testing::Quantize(problem, spec);
        ASSERT_TRUE(searched.ok() && range.ok());
        const auto change = [&](const QuantizedLayer& layer) {
          const std::vector<double> q = testing::TensorValues(layer, "weight");
          double sum = 0;
          for (size_t i = 0; i < q.size(); ++i) {
            sum += (problem.w.values[i] - q[i]) * (problem.w.values[i] - q[i]);
          }
          return sum;
        };
        // z = 2 of the range: levels -1.27, -0.63, 0, 0.63, each weight 0.27 off. z = 1 with a step
        // of 0.45: 0.9 is a level, and -1 is 0.55 off, 0.0095 a weight in place of 0.071.
        EXPECT_LT(change(*searched), change(*range) / 4)
            << (method == Method::kNearest ? "nearest" : "optq") << ", groups of " << group;
      }
    }
  }
}

}  // namespace
}  // namespace certiq::engine
