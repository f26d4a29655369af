// The search for a step against every step there is.

#include "engine/scales/diagonal_scale_search.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <random>
#include <vector>

#include "tests/engine/zero_points.h"

namespace certiq::engine {
namespace {

using testing::ZeroPointRule;
using testing::ZeroPointSpec;

struct Problem {
  std::vector<float> w;
  std::vector<double> metric;
};

// Weights with a heavy tail and a shift, metrics over some decades.
Problem MakeProblem(int64_t count, double decades, double shift, uint64_t seed) {
  std::mt19937_64 random(seed);
  std::normal_distribution<double> gauss;
  Problem problem;
  for (int64_t j = 0; j < count; ++j) {
    const double tail = j % 11 == 5 ? 3 : 1;
    problem.w.push_back(static_cast<float>(0.05 * (tail * gauss(random) + shift)));
    problem.metric.push_back(std::pow(10.0, decades * gauss(random) / 2));
  }
  return problem;
}

// F of (S3) in float64, codes as the sweep rounds them.
double Error(const Problem& problem, double scale, int zero, int bits) {
  double error = 0;
  for (size_t j = 0; j < problem.w.size(); ++j) {
    const double w = problem.w[j];
    const double code =
        std::clamp(std::nearbyint(w / scale), -1.0 * zero, std::ldexp(1.0, bits) - 1 - zero);
    error += problem.metric[j] * (w - scale * code) * (w - scale * code);
  }
  return error;
}

// The least F over all real scales: on each interval between breakpoints F is a quadratic, and its
// minimum is at a / b or at an end.
double LeastOverIntervals(const Problem& problem, const ResolvedSpec& spec) {
  std::vector<double> breaks;
  for (const float w : problem.w) {
    for (int t = 1; t < 1 << spec.bits && w != 0; ++t) breaks.push_back(std::abs(w) / (t - 0.5));
  }
  std::sort(breaks.begin(), breaks.end());
  double least = std::numeric_limits<double>::infinity();
  for (const int zero : testing::ZerosOf(spec)) {
    for (size_t i = 0; i < breaks.size(); ++i) {
      const double from = i == 0 ? breaks[0] / 2 : breaks[i - 1];
      const double middle = 0.5 * (from + breaks[i]);
      double a = 0;
      double b = 0;
      for (size_t j = 0; j < problem.w.size(); ++j) {
        const double code = std::clamp(std::nearbyint(problem.w[j] / middle), -1.0 * zero,
                                       std::ldexp(1.0, spec.bits) - 1 - zero);
        a += problem.metric[j] * problem.w[j] * code;
        b += problem.metric[j] * code * code;
      }
      const double best = b > 0 ? std::clamp(a / b, from, breaks[i]) : middle;
      for (const double scale : {best, breaks[i]}) {
        least = std::min(least, Error(problem, scale, zero, spec.bits));
      }
    }
  }
  return least;
}

// The least F over every value that a half type has between the smallest weight's last breakpoint
// and twice the largest weight.
double LeastOverType(const Problem& problem, const ResolvedSpec& spec) {
  double largest = 0;
  for (const float w : problem.w) largest = std::max<double>(largest, std::abs(w));
  double least = std::numeric_limits<double>::infinity();
  double scale = RepresentableAbove(spec.scale_dtype, largest * std::ldexp(0.1, -spec.bits));
  while (scale < 2 * largest) {
    for (const int zero : testing::ZerosOf(spec)) {
      least = std::min(least, Error(problem, scale, zero, spec.bits));
    }
    scale = RepresentableAbove(spec.scale_dtype, scale * (1 + 1e-9));
  }
  return least;
}

// The step found for the problem, with the metric in the middle of a longer one.
QuantParams Find(const Problem& problem, const ResolvedSpec& spec) {
  std::vector<double> padded(7, 1e3);
  padded.insert(padded.end(), problem.metric.begin(), problem.metric.end());
  padded.insert(padded.end(), 5, 1e3);
  const DiagonalMetric metric(padded);
  DiagonalScaleSearch search(spec);
  return search.Find(problem.w.data(), static_cast<int64_t>(problem.w.size()), metric, 7);
}

TEST(ScaleSearchTest, IsTheGlobalMinimumOverAllScales) {
  uint64_t seed = 1;
  for (const int64_t count : {1, 2, 3, 8, 33, 90}) {
    for (int bits = 2; bits <= 8; ++bits) {
      for (const ZeroPointRule rule :
           {ZeroPointRule::kSymmetric, ZeroPointRule::kSigned, ZeroPointRule::kAsymmetric}) {
        const bool symmetric = rule != ZeroPointRule::kAsymmetric;
        // The reference costs count^2 4^bits.
        if (count > 8 && bits > (symmetric ? 6 : 4)) continue;
        if (!symmetric && bits > 6) continue;
        for (const double decades : {0.0, 1.0, 4.0}) {
          const Problem problem =
              MakeProblem(count, decades, rule == ZeroPointRule::kSymmetric ? 0 : 0.7, ++seed);
          const ResolvedSpec spec = ZeroPointSpec(bits, rule, DType::kF32);
          const QuantParams step = Find(problem, spec);
          const double found = Error(problem, step.scale, step.zero, bits);
          const double least = LeastOverIntervals(problem, spec);
          // A scale of 24 bits is off by h = 2^-24 s: by Cauchy-Schwarz F grows by at most
          // 2 h sqrt(F b) + h^2 b, and s^2 b stays below 4 c, c = sum_j M_jj w_j^2 (a level is at
          // most twice the weight).
          double all = 0;
          for (size_t j = 0; j < problem.w.size(); ++j) {
            const double w = problem.w[j];
            all += problem.metric[j] * w * w;
          }
          EXPECT_LE(found, least * (1 + 1e-9) + 0x1p-22 * std::sqrt(least * all) + 0x1p-46 * all)
              << count << " weights, " << bits << " bits, rule " << static_cast<int>(rule)
              << ", seed " << seed;
        }
      }
    }
  }
}

// Few weights of very different importance: as the search narrows scales down, the zero points that
// matter move.
TEST(ScaleSearchTest, LosesNoZeroPointOnTheWay) {
  for (uint64_t seed = 2000; seed < 2400; ++seed) {
    const Problem problem = MakeProblem(3 + static_cast<int64_t>(seed % 4), 4, 0.5, seed);
    for (const ZeroPointRule rule : {ZeroPointRule::kSigned, ZeroPointRule::kAsymmetric}) {
      const ResolvedSpec spec = ZeroPointSpec(4, rule, DType::kBF16);
      const QuantParams step = Find(problem, spec);
      ASSERT_LE(Error(problem, step.scale, step.zero, 4), LeastOverType(problem, spec) * (1 + 1e-9))
          << "rule " << static_cast<int>(rule) << ", seed " << seed;
    }
  }
}

TEST(ScaleSearchTest, IsTheBestOfEveryScaleThatAHalfTypeHolds) {
  uint64_t seed = 1000;
  for (const DType dtype : {DType::kF16, DType::kBF16}) {
    for (const int64_t count : {1, 5, 40, 200}) {
      for (int bits = 2; bits <= 8; ++bits) {
        for (const ZeroPointRule rule :
             {ZeroPointRule::kSymmetric, ZeroPointRule::kSigned, ZeroPointRule::kAsymmetric}) {
          const bool symmetric = rule != ZeroPointRule::kAsymmetric;
          if (!symmetric && bits > (dtype == DType::kF16 ? 3 : 5)) continue;
          const Problem problem =
              MakeProblem(count, 1, rule == ZeroPointRule::kSymmetric ? 0 : -0.4, ++seed);
          const ResolvedSpec spec = ZeroPointSpec(bits, rule, dtype);
          const QuantParams step = Find(problem, spec);
          EXPECT_EQ(RoundTo(dtype, step.scale), step.scale);
          const double least = LeastOverType(problem, spec);
          EXPECT_LE(Error(problem, step.scale, step.zero, bits), least * (1 + 1e-9))
              << count << " weights, " << bits << " bits, rule " << static_cast<int>(rule)
              << ", seed " << seed;
        }
      }
    }
  }
}

// Where the reference above would take too long, no scale of a dense scan is better.
TEST(ScaleSearchTest, NoScaleOfADenseScanIsBetter) {
  for (const int64_t count : {64, 576, 4096}) {
    for (const int bits : {2, 4, 8}) {
      for (const ZeroPointRule rule :
           {ZeroPointRule::kSymmetric, ZeroPointRule::kSigned, ZeroPointRule::kAsymmetric}) {
        const Problem problem =
            MakeProblem(count, 2, rule == ZeroPointRule::kSymmetric ? 0 : 0.5, 77 + count + bits);
        const ResolvedSpec spec = ZeroPointSpec(bits, rule, DType::kF32);
        const QuantParams step = Find(problem, spec);
        const double found = Error(problem, step.scale, step.zero, bits);
        const std::vector<int> zeros = testing::ZerosOf(spec);
        for (int zero = std::max(0, step.zero - 2); zero <= step.zero + 2; ++zero) {
          if (std::find(zeros.begin(), zeros.end(), zero) == zeros.end()) continue;
          for (double factor = 0.3; factor < 3; factor *= 1.002) {
            ASSERT_LE(found, Error(problem, step.scale * factor, zero, bits) * (1 + 1e-6))
                << count << " weights, " << bits << " bits, rule " << static_cast<int>(rule) << ", "
                << factor << " times the scale, zero " << zero << " for " << step.zero;
          }
        }
      }
    }
  }
}

TEST(ScaleSearchTest, TakesFarFewerEvaluationsThanThereAreBreakpoints) {
  const Problem problem = MakeProblem(4096, 1, 0, 5);
  const ResolvedSpec spec = ZeroPointSpec(4, ZeroPointRule::kSymmetric, DType::kF32);
  const DiagonalMetric metric(problem.metric);
  DiagonalScaleSearch search(spec);
  search.Find(problem.w.data(), 4096, metric, 0);
  EXPECT_LE(search.evaluations(), 150);
  EXPECT_LE(search.finished(), 20);
}

TEST(ScaleSearchTest, FallsBackToAbsmaxWhereThereIsNothingToWeigh) {
  const ResolvedSpec spec = ZeroPointSpec(4, ZeroPointRule::kSymmetric, DType::kF32);
  const std::vector<float> zeros(9);
  const std::vector<float> ones(9, 1);
  const DiagonalMetric nothing(std::vector<double>(9, 0));
  const DiagonalMetric something(std::vector<double>(9, 2));
  DiagonalScaleSearch search(spec);
  EXPECT_EQ(search.Find(zeros.data(), 9, something, 0).scale, 1);
  EXPECT_EQ(search.Find(ones.data(), 9, nothing, 0).scale, 2.0f / 15);
  // One weight can always be met.
  const float scale = search.Find(ones.data(), 9, something, 0).scale;
  EXPECT_EQ(std::nearbyint(1 / scale) * scale, 1);
}

TEST(ScaleSearchTest, MagnitudesAtTheLimitsOfFloat32AreNoMatter) {
  for (const ZeroPointRule rule :
       {ZeroPointRule::kSymmetric, ZeroPointRule::kSigned, ZeroPointRule::kAsymmetric}) {
    const ResolvedSpec spec = ZeroPointSpec(4, rule, DType::kF32);
    const Problem plain = MakeProblem(50, 1, 0, 9);
    const QuantParams expected = Find(plain, spec);
    for (const int exponent : {-110, -60, 60, 120}) {
      Problem scaled = plain;
      for (float& w : scaled.w) w = std::ldexp(w, exponent);
      for (double& m : scaled.metric) m = std::ldexp(m, -exponent);
      const QuantParams step = Find(scaled, spec);
      EXPECT_EQ(step.scale, std::ldexp(expected.scale, exponent));
      EXPECT_EQ(step.zero, expected.zero);
    }
  }
}

TEST(ScaleSearchTest, ZeroPointsOfOneSidedWeights) {
  Problem problem;
  for (int j = 0; j < 16; ++j) {
    problem.w.push_back(static_cast<float>(1 + j));
    problem.metric.push_back(1);
  }
  const ResolvedSpec spec = ZeroPointSpec(4, ZeroPointRule::kAsymmetric, DType::kF32);
  const QuantParams up = Find(problem, spec);
  EXPECT_EQ(up.zero, 0);
  for (float& w : problem.w) w = -w;
  const QuantParams down = Find(problem, spec);
  EXPECT_EQ(down.zero, 15);
  EXPECT_EQ(down.scale, up.scale);
}

}  // namespace
}  // namespace certiq::engine
