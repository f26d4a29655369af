// Scale trials, joint scales (S6) and coordinate descent (S7): what they claim, in float64 from
// tokens and weights.

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <random>
#include <string>
#include <vector>

#include "engine/scales/qparams.h"
#include "tests/engine/problems.h"

namespace certiq::engine {
namespace {

using testing::Inputs;
using testing::MakeLayer;
using testing::RandomLayer;

// The objective of every row: |X w - X~ q|^2 + lambda |w - q|^2.
std::vector<double> Objectives(const RandomLayer& problem, const std::vector<double>& weight,
                               double lambda) {
  const textbook::Matrix& inputs = problem.inputs();
  std::vector<double> objectives;
  for (int64_t r = 0; r < problem.w.rows; ++r) {
    const double* q = weight.data() + r * problem.w.cols;
    double sum = 0;
    for (int64_t t = 0; t < inputs.rows; ++t) {
      double error = 0;
      for (int64_t j = 0; j < inputs.cols; ++j) {
        error += problem.x(t, j) * problem.w(r, j) - inputs(t, j) * q[j];
      }
      sum += error * error;
    }
    for (int64_t j = 0; j < inputs.cols; ++j) {
      sum += lambda * (problem.w(r, j) - q[j]) * (problem.w(r, j) - q[j]);
    }
    objectives.push_back(sum);
  }
  return objectives;
}

std::vector<double> Objectives(const RandomLayer& problem, const QuantizedLayer& layer) {
  return Objectives(problem, testing::TensorValues(layer, "weight"), layer.certificate.lambda_used);
}

RandomLayer Mismatched(RandomLayer problem, uint64_t seed) {
  problem.x_quantized = testing::Disturbed(problem.x, 0.2, seed);
  return problem;
}

// A few of everything that a sweep can be asked for.
std::vector<ResolvedSpec> Specs() {
  std::vector<ResolvedSpec> specs;
  for (const bool symmetric : {true, false}) {
    for (const int group : {0, 24}) {
      for (const Order order : {Order::kNatural, Order::kDecreasingNorm}) {
        for (const GroupScales scales : {GroupScales::kStatic, GroupScales::kDynamic}) {
          ResolvedSpec spec;
          spec.bits = group == 0 ? 3 : 2;
          spec.symmetric = symmetric;
          spec.group_size = group;
          spec.order = order;
          spec.group_scales = scales;
          spec.scale = symmetric ? ScaleRule::kMse : ScaleRule::kAbsmax;
          specs.push_back(spec);
        }
      }
    }
  }
  return specs;
}

void ExpectNeverHigher(const RandomLayer& problem, const ResolvedSpec& before,
                       const ResolvedSpec& after, const std::string& what) {
  const auto plain = testing::Quantize(problem, before);
  const auto refined = testing::Quantize(problem, after);
  ASSERT_TRUE(plain.ok() && refined.ok()) << plain.status() << refined.status();
  const std::vector<double> was = Objectives(problem, *plain);
  const std::vector<double> is = Objectives(problem, *refined);
  double sum_was = 0;
  double sum_is = 0;
  for (size_t r = 0; r < was.size(); ++r) {
    // The engine compares by sums that are off by 1e-6.
    EXPECT_LE(is[r], was[r] * (1 + 1e-5)) << what << ", row " << r;
    sum_was += was[r];
    sum_is += is[r];
  }
  EXPECT_LT(sum_is, 0.999 * sum_was) << what << ": nothing was gained";
}

TEST(ScaleTrialsTest, NeverRaiseAnErrorAndLowerTheSum) {
  const RandomLayer problem = MakeLayer(200, 150, 37, Inputs::kCorrelated, 601);
  for (const ResolvedSpec& spec : Specs()) {
    ResolvedSpec trials = spec;
    trials.scale_trials = 6;
    ExpectNeverHigher(problem, spec, trials, "trials");
  }
}

// Each row has the best of the grids that trials stretch, as sweeps on these grids show.
TEST(ScaleTrialsTest, AreTheBestOfTheStretchedGrids) {
  const RandomLayer problem = MakeLayer(150, 70, 41, Inputs::kCorrelated, 607);
  for (const int group : {0, 32}) {
    for (const DType type : {DType::kF32, DType::kF16}) {
      ResolvedSpec spec;
      spec.bits = 3;
      spec.group_size = group;
      spec.order = Order::kDecreasingNorm;
      spec.scale_dtype = type;
      const auto plain = testing::Quantize(problem, spec);
      spec.scale_trials = 7;
      const auto tried = testing::Quantize(problem, spec);
      ASSERT_TRUE(plain.ok() && tried.ok());
      const std::vector<double> scales = testing::TensorValues(*plain, "scales");
      std::vector<double> best(41, std::numeric_limits<double>::infinity());
      spec.scale_trials = 1;
      for (const float multiplier : TrialMultipliers(7)) {
        const auto grid_of_spec = std::make_shared<ExplicitGrid>();
        spec.grid = grid_of_spec;
        ExplicitGrid& grid = *grid_of_spec;
        for (const double scale : scales) {
          grid.scales.push_back(RoundTo(type, static_cast<float>(scale) * multiplier));
        }
        const auto once = testing::Quantize(problem, spec);
        ASSERT_TRUE(once.ok());
        const std::vector<double> objectives = Objectives(problem, *once);
        for (size_t r = 0; r < best.size(); ++r) best[r] = std::min(best[r], objectives[r]);
      }
      const std::vector<double> objectives = Objectives(problem, *tried);
      for (size_t r = 0; r < best.size(); ++r) {
        EXPECT_NEAR(objectives[r], best[r], 1e-5 * best[r]) << "row " << r;
      }
      for (const double scale : testing::TensorValues(*tried, "scales")) {
        EXPECT_EQ(scale, RoundTo(type, static_cast<float>(scale)));
      }
    }
  }
}

TEST(ScaleTrialsTest, MultipliersSurroundOne) {
  EXPECT_TRUE(TrialMultipliers(1).empty());
  std::vector<float> multipliers = TrialMultipliers(9);
  ASSERT_EQ(multipliers.size(), 9u);
  EXPECT_EQ(multipliers[0], 1.0f);
  std::sort(multipliers.begin(), multipliers.end());
  EXPECT_EQ(multipliers[4], 1.0f);
  for (size_t i = 1; i < 9; ++i) EXPECT_GT(multipliers[i], 1.001f * multipliers[i - 1]);
}

TEST(PolishTest, NeverRaisesAnErrorAndLowersTheSum) {
  const RandomLayer matched = MakeLayer(300, 150, 37, Inputs::kCorrelated, 613);
  const RandomLayer mismatched = Mismatched(matched, 617);
  for (const ResolvedSpec& spec : Specs()) {
    for (const Method method : {Method::kOptq, Method::kQronos, Method::kNearest}) {
      ResolvedSpec before = spec;
      before.method = method;
      if (method == Method::kQronos) {
        before.damping_rule = DampingRule::kRelativeTrace;
        before.damping_value = 0.01;
      }
      ResolvedSpec after = before;
      after.polish = 3;
      const std::string what = "method " + std::to_string(static_cast<int>(method));
      ExpectNeverHigher(matched, before, after, what + ", matched");
      ExpectNeverHigher(mismatched, before, after, what + ", mismatched");
    }
  }
}

TEST(PolishTest, NeverRaisesWhereLevelsAreHalfTypesOrInputsSingular) {
  for (const Format format : {Format::kDenseF16, Format::kDenseBF16}) {
    for (const Inputs inputs : {Inputs::kRankDeficient, Inputs::kIllConditioned}) {
      const RandomLayer problem = MakeLayer(80, 140, 20, inputs, 619);
      ResolvedSpec before;
      before.bits = 3;
      before.group_size = 32;
      before.format = format;
      before.damping_value = 0.1;
      ResolvedSpec after = before;
      after.polish = 4;
      const auto plain = testing::Quantize(problem, before);
      const auto polished = testing::Quantize(problem, after);
      ASSERT_TRUE(plain.ok() && polished.ok());
      const std::vector<double> was = Objectives(problem, *plain);
      const std::vector<double> is = Objectives(problem, *polished);
      for (size_t r = 0; r < was.size(); ++r) EXPECT_LE(is[r], was[r] * (1 + 1e-4));
    }
  }
}

// Where a pass has changed nothing, no other level of any weight, and no other scale of any group,
// is better.
TEST(PolishTest, EndsWhereNoCodeAndNoScaleCanBeBettered) {
  RandomLayer problem = Mismatched(MakeLayer(200, 140, 9, Inputs::kCorrelated, 631), 641);
  for (int64_t t = 0; t < 200; ++t) problem.x_quantized(t, 7) = 0;
  for (const bool symmetric : {true, false}) {
    for (const int group : {0, 16}) {
      ResolvedSpec spec;
      spec.bits = 3;
      spec.symmetric = symmetric;
      spec.group_size = group;
      spec.order = Order::kDecreasingNorm;
      spec.polish = 64;
      const auto layer = testing::Quantize(problem, spec);
      ASSERT_TRUE(layer.ok()) << layer.status();
      ASSERT_TRUE(layer->certificate.polish.has_value());
      ASSERT_LT(layer->certificate.polish->passes, 64);
      const std::vector<double> weight = testing::TensorValues(*layer, "weight");
      const std::vector<double> scales = testing::TensorValues(*layer, "scales");
      const std::vector<double> zeros = testing::TensorValues(*layer, "zeros");
      const std::vector<double> f = Objectives(problem, *layer);
      const int64_t groups = group == 0 ? 1 : (140 + group - 1) / group;
      const auto cell = [&](int64_t r, int64_t j) {
        return static_cast<size_t>(r * groups + (group == 0 ? 0 : j / group));
      };
      const auto change = [&](int64_t j, double by) {
        std::vector<double> other = weight;
        for (int64_t r = 0; r < 9; ++r) {
          const double zero = symmetric ? 4 : zeros[cell(r, j)];
          const auto at = static_cast<size_t>(r * 140 + j);
          const double code = std::round(other[at] / scales[cell(r, j)] + zero) + by;
          if (code >= 0 && code <= 7) other[at] += by * scales[cell(r, j)];
        }
        return Objectives(problem, other, layer->certificate.lambda_used);
      };
      for (int64_t j = 0; j < 140; ++j) {
        if (j == 7) continue;
        for (const double by : {-1.0, 1.0}) {
          const std::vector<double> other = change(j, by);
          for (size_t r = 0; r < 9; ++r) {
            EXPECT_GE(other[r], f[r] * (1 - 2e-5)) << "row " << r << ", feature " << j;
          }
        }
      }
      for (int64_t g = 0; g < groups; ++g) {
        for (const double stretch : {0.998, 1.002}) {
          std::vector<double> other = weight;
          for (int64_t r = 0; r < 9; ++r) {
            for (int64_t j = 0; j < 140; ++j) {
              if (cell(r, j) % groups == static_cast<size_t>(g)) {
                other[static_cast<size_t>(r * 140 + j)] *= stretch;
              }
            }
          }
          const auto at = Objectives(problem, other, layer->certificate.lambda_used);
          for (size_t r = 0; r < 9; ++r) EXPECT_GE(at[r], f[r] * (1 - 1e-5)) << "group " << g;
        }
      }
    }
  }
}

// Every row of codes there is, on a grid that is given: polished codes are as good as any that
// differs in one place, and often the best of all.
TEST(PolishTest, AgainstBruteForce) {
  int64_t best = 0;
  int64_t rows = 0;
  for (uint64_t seed = 0; seed < 20; ++seed) {
    RandomLayer problem = MakeLayer(12, 5, 6, Inputs::kCorrelated, 700 + seed);
    if (seed % 2 == 1) problem = Mismatched(problem, 800 + seed);
    ResolvedSpec spec;
    spec.method = seed % 3 == 0 ? Method::kNearest : Method::kOptq;
    spec.bits = 2;
    spec.polish = 64;
    spec.symmetric = false;
    const auto grid_of_spec = std::make_shared<ExplicitGrid>();
    spec.grid = grid_of_spec;
    ExplicitGrid& grid = *grid_of_spec;
    grid.scales.assign(6, 0.06f);
    grid.zero_points.assign(6, 2);
    grid.lowest_code = seed % 4 == 0 ? 1 : 0;
    const auto layer = testing::Quantize(problem, spec);
    ASSERT_TRUE(layer.ok()) << layer.status();
    const std::vector<double> ours = Objectives(problem, *layer);
    const std::vector<double> weight = testing::TensorValues(*layer, "weight");
    const int lowest = *grid.lowest_code;
    std::vector<double> least(6, std::numeric_limits<double>::infinity());
    std::vector<double> neighbour = least;
    for (int code = 0; code < 1024; ++code) {
      std::vector<double> q(30);
      std::vector<int> apart(6);
      bool inside = true;
      for (size_t j = 0; j < 5; ++j) {
        const int u = code >> (2 * j) & 3;
        inside = inside && u >= lowest;
        for (size_t r = 0; r < 6; ++r) {
          q[r * 5 + j] = 0.06f * static_cast<float>(u - 2);
          apart[r] += q[r * 5 + j] != weight[r * 5 + j] ? 1 : 0;
        }
      }
      if (!inside) continue;
      const std::vector<double> f = Objectives(problem, q, layer->certificate.lambda_used);
      for (size_t r = 0; r < 6; ++r) {
        least[r] = std::min(least[r], f[r]);
        if (apart[r] == 1) neighbour[r] = std::min(neighbour[r], f[r]);
      }
    }
    for (size_t r = 0; r < 6; ++r) {
      ++rows;
      EXPECT_GE(neighbour[r], ours[r] * (1 - 2e-5));
      EXPECT_GE(ours[r], least[r] * (1 - 1e-6));
      best += ours[r] <= least[r] * (1 + 1e-6) ? 1 : 0;
    }
  }
  EXPECT_GE(best, rows / 3);
}

// After polish the certificate speaks of the final codes.
TEST(PolishTest, TheCertificateIsThatOfTheFinalCodes) {
  const RandomLayer matched = MakeLayer(300, 130, 20, Inputs::kCorrelated, 653);
  for (const RandomLayer& problem : {matched, Mismatched(matched, 659)}) {
    for (const Method method : {Method::kOptq, Method::kQronos, Method::kNearest}) {
      ResolvedSpec spec;
      spec.method = method;
      spec.bits = 3;
      spec.group_size = 32;
      spec.order = Order::kDecreasingNorm;
      spec.damping_rule = DampingRule::kRelativeTrace;
      spec.damping_value = 0.02;
      const auto plain = testing::Quantize(problem, spec);
      spec.polish = 2;
      spec.scale_trials = method == Method::kNearest ? 1 : 3;
      const auto layer = testing::Quantize(problem, spec);
      ASSERT_TRUE(plain.ok() && layer.ok());
      const LayerCertificate& c = layer->certificate;
      EXPECT_FALSE(plain->certificate.polish.has_value());
      ASSERT_TRUE(c.polish.has_value());
      EXPECT_GE(c.polish->passes, 1);
      EXPECT_LE(c.polish->passes, 2);
      EXPECT_LT(c.damped_squared_error, c.polish->damped_before);
      const std::vector<double> damped = Objectives(problem, *layer);
      const std::vector<double> squared =
          Objectives(problem, testing::TensorValues(*layer, "weight"), 0);
      double sum_damped = 0;
      double sum = 0;
      for (size_t r = 0; r < damped.size(); ++r) {
        sum_damped += damped[r];
        sum += squared[r];
        EXPECT_NEAR(c.row_error[r], std::sqrt(squared[r]), 1e-4 * std::sqrt(squared[r]));
        EXPECT_LE(std::sqrt(damped[r]), c.row_bound[r] * (1 + 1e-6));
      }
      EXPECT_NEAR(c.damped_squared_error, sum_damped, 1e-4 * sum_damped);
      EXPECT_NEAR(c.squared_error, sum, 1e-4 * sum);
    }
  }
}

TEST(RefineTest, IsBitIdenticalWhateverTheExecutor) {
  const RandomLayer problem = Mismatched(MakeLayer(300, 200, 300, Inputs::kCorrelated, 661), 673);
  ResolvedSpec spec;
  spec.bits = 3;
  spec.group_size = 40;
  spec.order = Order::kDecreasingNorm;
  spec.scale_trials = 4;
  spec.polish = 3;
  testing::ContraryExecutor contrary;
  const auto a = testing::Quantize(problem, spec);
  const auto b = testing::Quantize(problem, spec, &contrary);
  ASSERT_TRUE(a.ok() && b.ok());
  for (size_t t = 0; t < a->tensors.size(); ++t) {
    EXPECT_EQ(a->tensors[t].bytes, b->tensors[t].bytes) << a->tensors[t].role;
  }
  EXPECT_EQ(a->certificate.row_error, b->certificate.row_error);
  EXPECT_EQ(a->certificate.row_bound, b->certificate.row_bound);
  EXPECT_EQ(a->certificate.polish->damped_before, b->certificate.polish->damped_before);
}

}  // namespace
}  // namespace certiq::engine
