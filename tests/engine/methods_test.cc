// Every method, order, grid and damping rule against textbook formulas.

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <functional>
#include <numeric>

#include "base/status.h"
#include "engine/gram/feature_order.h"
#include "engine/linalg/sigma_max.h"
#include "tests/engine/problems.h"

namespace certiq::engine {
namespace {

using testing::Inputs;
using testing::MakeLayer;
using testing::RandomLayer;

RandomLayer Mismatched(int64_t tokens, int64_t features, int64_t rows, uint64_t seed) {
  RandomLayer layer = MakeLayer(tokens, features, rows, Inputs::kCorrelated, seed);
  layer.x_quantized = testing::Disturbed(layer.x, 0.3, seed + 1);
  return layer;
}

struct DampedSums {
  textbook::Matrix h;
  textbook::Matrix g;
  textbook::Matrix c;
};

DampedSums Sums(const RandomLayer& layer, double lambda) {
  DampedSums sums{textbook::Gram(layer.inputs()), textbook::CrossGram(layer.inputs(), layer.x),
                  textbook::Gram(layer.x)};
  for (int64_t j = 0; j < sums.h.rows; ++j) {
    sums.h(j, j) += lambda;
    sums.g(j, j) += lambda;
    sums.c(j, j) += lambda;
  }
  return sums;
}

std::vector<double> Weights(const QuantizedLayer& layer, int64_t row, int64_t features) {
  const auto all = testing::TensorValues(layer, "weight");
  return {all.begin() + row * features, all.begin() + (row + 1) * features};
}

// Rows whose levels all agree; the rest forked at a tie.
int64_t EqualRows(const QuantizedLayer& layer, int64_t rows, int64_t features,
                  const std::function<std::vector<double>(int64_t)>& truth) {
  int64_t equal = 0;
  for (int64_t r = 0; r < rows; ++r) {
    const auto got = Weights(layer, r, features);
    const auto expected = truth(r);
    bool same = true;
    for (size_t j = 0; j < got.size(); ++j) {
      same = same && std::abs(got[j] - expected[j]) <= 1e-5 * std::abs(expected[j]) + 1e-12;
    }
    equal += same ? 1 : 0;
  }
  return equal;
}

TEST(QronosTest, MatchesTheNormalEquationsOfThePaper) {
  for (const int64_t features : {1, 2, 9, 40}) {
    const RandomLayer problem = Mismatched(150, features, 24, 211 + features);
    ResolvedSpec spec;
    spec.method = Method::kQronos;
    spec.damping_rule = DampingRule::kRelativeTrace;
    spec.damping_value = 0.02;
    const auto layer = testing::Quantize(problem, spec);
    ASSERT_TRUE(layer.ok()) << layer.status();
    const DampedSums sums = Sums(problem, layer->certificate.lambda_used);
    const int64_t equal = EqualRows(*layer, 24, features, [&](int64_t r) {
      const auto w = testing::Row(problem.w, r);
      return textbook::Qronos(w, sums.h, sums.g, textbook::AbsmaxGrid(w, 4, true, 0)).level;
    });
    EXPECT_GE(equal, 23) << features;
  }
}

// (M7), (M8), (B3) recomputed from the tokens.
TEST(QronosTest, CertifiesErrorFloorAndBothInitialTerms) {
  for (const Method method : {Method::kQronos, Method::kOptq}) {
    for (const int bits : {2, 4}) {
      const RandomLayer problem = Mismatched(200, 50, 16, 223);
      ResolvedSpec spec;
      spec.method = method;
      spec.bits = bits;
      spec.damping_rule = DampingRule::kRelativeTrace;
      spec.damping_value = 0.01;
      const auto layer = testing::Quantize(problem, spec);
      ASSERT_TRUE(layer.ok()) << layer.status();
      const LayerCertificate& c = layer->certificate;
      const DampedSums sums = Sums(problem, c.lambda_used);
      double squared = 0;
      double damped = 0;
      double floor = 0;
      double unchanged = 0;
      double energy = 0;
      for (int64_t r = 0; r < 16; ++r) {
        const auto w = testing::Row(problem.w, r);
        const auto q = Weights(*layer, r, 50);
        double error = 0;
        double norm = 0;
        for (int64_t t = 0; t < 200; ++t) {
          double at = 0;
          double before = 0;
          double out = 0;
          for (int64_t j = 0; j < 50; ++j) {
            const auto k = static_cast<size_t>(j);
            at += problem.x(t, j) * w[k] - problem.x_quantized(t, j) * q[k];
            before += (problem.x(t, j) - problem.x_quantized(t, j)) * w[k];
            out += problem.x(t, j) * w[k];
          }
          error += at * at;
          unchanged += before * before;
          energy += out * out;
        }
        for (size_t j = 0; j < w.size(); ++j) norm += (w[j] - q[j]) * (w[j] - q[j]);
        const auto at = static_cast<size_t>(r);
        EXPECT_NEAR(c.row_error[at], std::sqrt(error), 1e-4 * std::sqrt(error));
        EXPECT_LE(std::sqrt(error + c.lambda_used * norm), c.row_bound[at]);
        squared += error;
        damped += error + c.lambda_used * norm;
        floor += textbook::Floor(w, sums.h, sums.g, sums.c);
      }
      EXPECT_NEAR(c.squared_error, squared, 1e-4 * squared);
      EXPECT_NEAR(c.damped_squared_error, damped, 1e-4 * damped);
      EXPECT_NEAR(c.reference_energy, energy, 1e-4 * energy);
      EXPECT_LE(c.identity_residual, 1e-4);
      EXPECT_NEAR(*c.optq_initial, std::sqrt(unchanged), 1e-4 * std::sqrt(unchanged));
      if (method == Method::kQronos) {
        EXPECT_NEAR(*c.floor, std::sqrt(floor), 1e-3 * std::sqrt(floor));
        EXPECT_LE(*c.floor, std::sqrt(damped));
        EXPECT_LE(*c.floor, *c.qronos_initial * (1 + 1e-9));
        EXPECT_LE(*c.qronos_initial, *c.optq_initial);
      }
    }
  }
}

// With one feature nothing remains to absorb q_1's error: (B3) must use |e_1| itself.
TEST(QronosTest, BoundCoversTheFirstFeatureAlone) {
  RandomLayer problem = Mismatched(30, 1, 64, 227);
  for (double& v : problem.x_quantized.values) v *= 0.25;
  ResolvedSpec spec;
  spec.method = Method::kQronos;
  spec.bits = 2;
  spec.damping_rule = DampingRule::kAbsolute;
  spec.damping_value = 1e-6;
  const auto layer = testing::Quantize(problem, spec);
  ASSERT_TRUE(layer.ok()) << layer.status();
  EXPECT_GT(layer->certificate.clipped_weights, 30) << "targets are four times the weights";
  for (size_t r = 0; r < 64; ++r) {
    EXPECT_LE(layer->certificate.row_error[r], layer->certificate.row_bound[r]);
  }
}

TEST(QronosTest, IsOptqWhereInputsMatch) {
  const RandomLayer problem = MakeLayer(200, 60, 10, Inputs::kCorrelated, 229);
  ResolvedSpec spec;
  spec.damping_rule = DampingRule::kRelativeTrace;
  const auto optq = testing::Quantize(problem, spec);
  spec.method = Method::kQronos;
  const auto qronos = testing::Quantize(problem, spec);
  ASSERT_TRUE(optq.ok() && qronos.ok());
  EXPECT_EQ(optq->tensors[0].bytes, qronos->tensors[0].bytes);
  EXPECT_EQ(*qronos->certificate.qronos_initial, 0);
}

TEST(QronosTest, WithoutDampingUsesHeldOutTokensOrWarns) {
  RandomLayer problem = Mismatched(200, 40, 8, 233);
  ResolvedSpec spec;
  spec.method = Method::kQronos;
  spec.damping_rule.reset();
  const auto warned = testing::Quantize(problem, spec);
  ASSERT_TRUE(warned.ok()) << warned.status();
  ASSERT_FALSE(warned->certificate.warnings.empty());
  EXPECT_NE(warned->certificate.warnings[0].find("1e-6 sigma_max"), std::string::npos);

  const RandomLayer other = Mismatched(60, 40, 8, 239);
  problem.held_x = other.x;
  problem.held_x_quantized = other.x_quantized;
  const auto chosen = testing::Quantize(problem, spec);
  ASSERT_TRUE(chosen.ok()) << chosen.status();
  EXPECT_EQ(chosen->certificate.damping_candidates.size(), 6u);
  EXPECT_EQ(chosen->certificate.held_out_tokens, 60);
  EXPECT_EQ(chosen->certificate.tokens, 260) << "the final run uses all tokens";
}

TEST(HeldOutTest, ErrorIsThatOfTokensOutsideTheFit) {
  RandomLayer problem = MakeLayer(200, 40, 8, Inputs::kCorrelated, 241);
  problem.held_x = MakeLayer(70, 40, 1, Inputs::kCorrelated, 251).x;
  for (const Order order : {Order::kNatural, Order::kDecreasingNorm}) {
    ResolvedSpec spec;
    spec.order = order;
    const auto layer = testing::Quantize(problem, spec);
    ASSERT_TRUE(layer.ok()) << layer.status();
    EXPECT_EQ(layer->certificate.tokens, 200);
    EXPECT_EQ(layer->certificate.held_out_tokens, 70);
    double squared = 0;
    double energy = 0;
    for (int64_t r = 0; r < 8; ++r) {
      const auto w = testing::Row(problem.w, r);
      auto change = Weights(*layer, r, 40);
      for (size_t j = 0; j < w.size(); ++j) change[j] = w[j] - change[j];
      squared += textbook::SquaredImage(problem.held_x, change);
      energy += textbook::SquaredImage(problem.held_x, w);
    }
    EXPECT_NEAR(*layer->certificate.held_out_relative_error, std::sqrt(squared / energy),
                1e-4 * std::sqrt(squared / energy));
  }
}

TEST(HeldOutTest, LadderTakesTheStepWithTheLeastUnseenError) {
  RandomLayer problem = MakeLayer(90, 60, 12, Inputs::kCorrelated, 257);
  problem.held_x = MakeLayer(200, 60, 1, Inputs::kCorrelated, 263).x;
  ResolvedSpec spec;
  spec.damping_rule = DampingRule::kHeldOut;
  spec.damping_candidates = {0.001, 0.1, 100};
  const auto layer = testing::Quantize(problem, spec);
  ASSERT_TRUE(layer.ok()) << layer.status();
  const LayerCertificate& c = layer->certificate;
  ASSERT_EQ(c.damping_candidates.size(), 3u);
  const auto best = std::min_element(
      c.damping_candidates.begin(), c.damping_candidates.end(),
      [](auto& a, auto& b) { return a.held_out_relative_error < b.held_out_relative_error; });
  EXPECT_EQ(*c.held_out_relative_error, best->held_out_relative_error);
  // The same ratio of the traces with all tokens.
  const auto mean = [](const textbook::Matrix& x) { return textbook::SquaredNorm(x) / 60; };
  const double all = mean(problem.x) + mean(problem.held_x);
  EXPECT_NEAR(c.lambda_used / all, best->lambda / mean(problem.x), 1e-6 * c.lambda_used / all);
  // Each step alone, fitted without the held-out tokens, has the error it was judged by.
  for (size_t i = 0; i < 3; ++i) {
    ResolvedSpec one = spec;
    one.damping_rule = DampingRule::kRelativeTrace;
    one.damping_value = spec.damping_candidates[i];
    const auto alone = testing::Quantize(problem, one);
    ASSERT_TRUE(alone.ok());
    EXPECT_EQ(*alone->certificate.held_out_relative_error,
              c.damping_candidates[i].held_out_relative_error);
  }
}

TEST(HeldOutTest, NeedsTokens) {
  ResolvedSpec spec;
  spec.damping_rule = DampingRule::kHeldOut;
  const auto layer = testing::Quantize(MakeLayer(50, 10, 2, Inputs::kGaussian, 269), spec);
  EXPECT_EQ(layer.status().code(), absl::StatusCode::kFailedPrecondition);
  EXPECT_EQ(base::PreconditionOf(layer.status())->type, "HELD_OUT");
}

TEST(OrderTest, DecreasingNormIsThePermutedProblem) {
  RandomLayer problem = MakeLayer(200, 45, 20, Inputs::kCorrelated, 271);
  for (int64_t t = 0; t < 200; ++t) {
    for (int64_t j = 0; j < 45; ++j) {
      problem.x(t, j) = static_cast<float>(problem.x(t, j) * static_cast<double>(1 + (j * 7) % 11));
    }
  }
  const auto order = FeatureOrder(Order::kDecreasingNorm, testing::Accumulate(problem.x));
  RandomLayer permuted = problem;
  for (int64_t i = 0; i < 45; ++i) {
    for (int64_t t = 0; t < 200; ++t) permuted.x(t, i) = problem.x(t, order[i]);
    for (int64_t r = 0; r < 20; ++r) permuted.w(r, i) = problem.w(r, order[i]);
  }
  ResolvedSpec natural;
  ResolvedSpec ordered;
  ordered.order = Order::kDecreasingNorm;
  const auto a = testing::Quantize(permuted, natural);
  const auto b = testing::Quantize(problem, ordered);
  ASSERT_TRUE(a.ok() && b.ok());
  for (int64_t r = 0; r < 20; ++r) {
    const auto left = Weights(*a, r, 45);
    const auto right = Weights(*b, r, 45);
    for (int64_t i = 0; i < 45; ++i) ASSERT_EQ(left[i], right[order[i]]) << r << " " << i;
  }
  EXPECT_NEAR(a->certificate.squared_error, b->certificate.squared_error,
              1e-9 * a->certificate.squared_error);
}

TEST(OrderTest, StaticGroupsStayWithTheirColumnsAndDynamicOnesFollowTheOrder) {
  RandomLayer problem = MakeLayer(100, 32, 4, Inputs::kGaussian, 277);
  for (int64_t t = 0; t < 100; ++t) {
    for (int64_t j = 0; j < 32; ++j) problem.x(t, j) *= static_cast<double>(1 + (j * 5) % 32);
  }
  ResolvedSpec spec;
  spec.order = Order::kDecreasingNorm;
  spec.group_size = 8;
  const auto fixed = testing::Quantize(problem, spec);
  ASSERT_TRUE(fixed.ok());
  const auto groups = testing::TensorValues(*fixed, "g_idx");
  for (int64_t j = 0; j < 32; ++j) EXPECT_EQ(groups[j], j / 8);

  spec.group_scales = GroupScales::kDynamic;
  const auto moving = testing::Quantize(problem, spec);
  ASSERT_TRUE(moving.ok());
  const auto order = FeatureOrder(Order::kDecreasingNorm, testing::Accumulate(problem.x));
  const auto g_idx = testing::TensorValues(*moving, "g_idx");
  for (int64_t i = 0; i < 32; ++i) EXPECT_EQ(g_idx[order[i]], i / 8);
}

TEST(DynamicScalesTest, MatchColumnByColumnUpdates) {
  for (const int64_t group : {8, 16, 24, 50, 130}) {
    for (const bool symmetric : {true, false}) {
      const int64_t features = group == 130 ? 150 : 60;
      const RandomLayer problem = MakeLayer(2 * features, features, 12, Inputs::kCorrelated, 281);
      ResolvedSpec spec;
      spec.group_size = static_cast<int32_t>(group);
      spec.group_scales = GroupScales::kDynamic;
      spec.symmetric = symmetric;
      const auto layer = testing::Quantize(problem, spec);
      ASSERT_TRUE(layer.ok()) << layer.status();
      const DampedSums sums = Sums(problem, layer->certificate.lambda_used);
      const int64_t equal = EqualRows(*layer, 12, features, [&](int64_t r) {
        textbook::RowGrid grid;
        return textbook::DynamicOptq(testing::Row(problem.w, r), sums.h, 4, symmetric, group, grid)
            .level;
      });
      // Steps come out of float32 sums: a code next to a tie may differ.
      EXPECT_GE(equal, 10) << "group " << group << " symmetric " << symmetric;
    }
  }
}

// (S2) against the same search with std::pow.
TEST(ShrinkSearchTest, FindsTheStepOfTheDefinition) {
  const RandomLayer problem = MakeLayer(100, 64, 40, Inputs::kGaussian, 283);
  for (const bool symmetric : {true, false}) {
    for (const int bits : {2, 3, 4, 8}) {
      ResolvedSpec spec;
      spec.method = Method::kNearest;
      spec.scale = ScaleRule::kMse;
      spec.bits = bits;
      spec.symmetric = symmetric;
      const auto layer = testing::Quantize(problem, spec);
      ASSERT_TRUE(layer.ok()) << layer.status();
      const auto scales = testing::TensorValues(*layer, "scales");
      const auto zeros = testing::TensorValues(*layer, "zeros");
      for (int64_t r = 0; r < 40; ++r) {
        const auto w = testing::Row(problem.w, r);
        const double low = std::min(0.0, *std::min_element(w.begin(), w.end()));
        const double high = std::max(0.0, *std::max_element(w.begin(), w.end()));
        const double top = std::exp2(bits) - 1;
        const auto loss = [&](double scale, double zero) {
          double sum = 0;
          for (const double v : w) {
            const double code = std::clamp(std::nearbyint(v / scale) + zero, 0.0, top);
            sum += std::pow(std::abs(v - scale * (code - zero)), 2.4);
          }
          return sum;
        };
        double least = INFINITY;
        for (int i = 0; i < 80; ++i) {
          const double p = 1 - i / 100.0;
          const double span = symmetric ? 2 * std::max(-low, high) * p : (high - low) * p;
          const double scale = span / top;
          least = std::min(least, loss(scale, symmetric ? std::exp2(bits - 1)
                                                        : std::nearbyint(-p * low / scale)));
        }
        const auto at = static_cast<size_t>(r);
        EXPECT_LE(loss(scales[at], symmetric ? std::exp2(bits - 1) : zeros[at]), least * (1 + 1e-4))
            << bits << " " << r;
      }
    }
  }
}

TEST(NearestTest, IsPlainRoundingWithItsOwnBound) {
  for (const bool mismatched : {false, true}) {
    for (const int bits : {2, 4}) {
      RandomLayer problem = Mismatched(120, 50, 20, 293);
      if (!mismatched) problem.x_quantized = {};
      ResolvedSpec spec;
      spec.method = Method::kNearest;
      spec.bits = bits;
      spec.compare_nearest = true;
      const auto layer = testing::Quantize(problem, spec);
      ASSERT_TRUE(layer.ok()) << layer.status();
      const LayerCertificate& c = layer->certificate;
      EXPECT_TRUE(c.damping_attempts.empty());
      EXPECT_EQ(c.lambda_used, 0);
      EXPECT_EQ(*c.nearest_relative_error, c.relative_error);
      for (int64_t r = 0; r < 20; ++r) {
        const auto w = testing::Row(problem.w, r);
        const auto grid = textbook::AbsmaxGrid(w, bits, true, 0);
        const auto q = Weights(*layer, r, 50);
        double reach = 0;
        double width = 0;
        double error = 0;
        double before = 0;
        for (size_t j = 0; j < w.size(); ++j) {
          const auto at = static_cast<int64_t>(j);
          const double level = grid.Level(at, grid.Code(at, w[j]));
          ASSERT_EQ(q[j], static_cast<double>(static_cast<float>(level)));
          double norm = 0;
          for (int64_t t = 0; t < 120; ++t) norm += std::pow(problem.inputs()(t, at), 2);
          const double eps = std::max(grid.scale[0] / 2, std::abs(w[j] - q[j]));
          reach += eps * std::sqrt(norm);
          width += eps * eps;
        }
        for (int64_t t = 0; t < 120; ++t) {
          double out = 0;
          double drift = 0;
          for (size_t j = 0; j < w.size(); ++j) {
            const auto at = static_cast<int64_t>(j);
            out += problem.x(t, at) * w[j] - problem.inputs()(t, at) * q[j];
            drift += (problem.x(t, at) - problem.inputs()(t, at)) * w[j];
          }
          error += out * out;
          before += drift * drift;
        }
        // sigma_max by the power method, to 1e-6.
        const auto h = textbook::Gram(problem.inputs());
        std::vector<double> x(50, 1.0);
        double sigma = 0;
        for (int i = 0; i < 2000; ++i) {
          std::vector<double> y(50);
          for (int64_t a = 0; a < 50; ++a) {
            for (int64_t b = 0; b < 50; ++b) y[a] += h(a, b) * x[b];
          }
          sigma = std::sqrt(std::inner_product(y.begin(), y.end(), y.begin(), 0.0));
          for (size_t a = 0; a < 50; ++a) x[a] = y[a] / sigma;
        }
        const double expected = std::min(reach, std::sqrt(width * sigma)) + std::sqrt(before);
        const auto at = static_cast<size_t>(r);
        EXPECT_NEAR(c.row_bound[at], expected, 3e-4 * expected);
        EXPECT_LE(std::sqrt(error), c.row_bound[at]);
        EXPECT_NEAR(c.row_error[at], std::sqrt(error), 1e-4 * std::sqrt(error));
      }
    }
  }
}

// (B2) is attained: one feature, every weight a tie or half a step outside.
TEST(NearestTest, BoundIsAttainedByOneFeature) {
  RandomLayer problem = MakeLayer(10, 1, 8, Inputs::kGaussian, 307);
  for (double& v : problem.w.values) v = std::abs(v);
  ResolvedSpec spec;
  spec.method = Method::kNearest;
  const auto layer = testing::Quantize(problem, spec);
  ASSERT_TRUE(layer.ok());
  for (size_t r = 0; r < 8; ++r) {
    EXPECT_LE(layer->certificate.row_error[r], layer->certificate.row_bound[r]);
    EXPECT_GE(layer->certificate.row_error[r], layer->certificate.row_bound[r] * (1 - 3e-6));
  }
}

TEST(DampingTest, SigmaMaxIsTheLargestEigenvalue) {
  // A diagonal with a known top, hidden by its neighbours.
  UpperTriangle<double> s(300);
  for (int64_t i = 0; i < 300; ++i) s.at(i, i) = 1 + static_cast<double>((i * 37) % 300) / 100;
  s.at(120, 120) = 4.001;
  SerialExecutor serial;
  RunContext context;
  context.executor = &serial;
  const auto largest = LargestEigenvalue(s, context);
  ASSERT_TRUE(largest.ok());
  EXPECT_NEAR(*largest, 4.001, 1e-5);
  EXPECT_LE(*largest, 4.001 * (1 + 1e-12));
  const auto bound = LargestEigenvalueBound(s, context);
  ASSERT_TRUE(bound.ok());
  EXPECT_GE(*bound, 4.001);
  EXPECT_LE(*bound, 4.001 * 1.001);

  const RandomLayer problem = MakeLayer(200, 2, 3, Inputs::kCorrelated, 311);
  ResolvedSpec spec;
  spec.damping_rule = DampingRule::kRelativeSigmaMax;
  spec.damping_value = 0.5;
  const auto layer = testing::Quantize(problem, spec);
  ASSERT_TRUE(layer.ok());
  const auto h = textbook::Gram(problem.x);
  const double top = (h(0, 0) + h(1, 1)) / 2 + std::hypot((h(0, 0) - h(1, 1)) / 2, h(0, 1));
  EXPECT_NEAR(layer->certificate.lambda_requested, 0.5 * top, 1e-6 * top);
}

TEST(DampingTest, FallsBackToNearestOnlyWhenAskedAndSaysSo) {
  const RandomLayer problem = MakeLayer(20, 60, 4, Inputs::kGaussian, 101);
  ResolvedSpec spec;
  spec.damping_value = 0;
  spec.max_attempts = 2;
  spec.on_failure = OnFailure::kNearest;
  const auto layer = testing::Quantize(problem, spec);
  ASSERT_TRUE(layer.ok()) << layer.status();
  EXPECT_EQ(layer->certificate.outcome, Outcome::kFellBackToNearest);
  ASSERT_EQ(layer->certificate.damping_attempts.size(), 2u);
  for (const DampingAttempt& attempt : layer->certificate.damping_attempts) {
    EXPECT_NE(attempt.cause, StabilityCause::kNone);
  }
  spec = {};
  spec.method = Method::kNearest;
  const auto plain = testing::Quantize(problem, spec);
  ASSERT_TRUE(plain.ok());
  EXPECT_EQ(plain->tensors[0].bytes, layer->tensors[0].bytes);
  EXPECT_EQ(plain->certificate.row_bound, layer->certificate.row_bound);
}

TEST(ExplicitGridTest, IsUsedAsGivenWithinItsCodes) {
  const RandomLayer problem = MakeLayer(100, 16, 2, Inputs::kGaussian, 313);
  ResolvedSpec spec;
  spec.method = Method::kNearest;
  spec.grid = std::make_shared<const ExplicitGrid>(ExplicitGrid{{0.02f, 0.03f}, {}, 1, 15});
  const auto layer = testing::Quantize(problem, spec);
  ASSERT_TRUE(layer.ok()) << layer.status();
  for (int64_t r = 0; r < 2; ++r) {
    const double step = r == 0 ? 0.02f : 0.03f;
    for (int64_t j = 0; j < 16; ++j) {
      const double code = std::clamp(std::nearbyint(problem.w(r, j) / step), -7.0, 7.0);
      EXPECT_FLOAT_EQ(static_cast<float>(Weights(*layer, r, 16)[j]),
                      static_cast<float>(step * code));
    }
  }
  spec.grid = std::make_shared<const ExplicitGrid>(ExplicitGrid{{0.02f}, {}, 1, 15});
  const auto refused = testing::Quantize(problem, spec);
  EXPECT_EQ(refused.status().code(), absl::StatusCode::kInvalidArgument) << refused.status();
}

TEST(LevelsTest, HalfFormatsQuantizeToTheRoundedLevels) {
  const RandomLayer problem = MakeLayer(100, 30, 6, Inputs::kGaussian, 317);
  for (const Format format : {Format::kDenseF16, Format::kDenseBF16}) {
    const DType type = format == Format::kDenseF16 ? DType::kF16 : DType::kBF16;
    ResolvedSpec spec;
    spec.method = Method::kNearest;
    spec.bits = 8;
    spec.format = format;
    const auto layer = testing::Quantize(problem, spec);
    ASSERT_TRUE(layer.ok()) << layer.status();
    EXPECT_EQ(layer->tensors[0].dtype, type);
    const auto scales = testing::TensorValues(*layer, "scales");
    for (int64_t r = 0; r < 6; ++r) {
      const auto got = Weights(*layer, r, 30);
      for (int64_t j = 0; j < 30; ++j) {
        double best = INFINITY;
        for (int code = -128; code <= 127; ++code) {
          const double level =
              RoundTo(type, static_cast<float>(scales[r]) * static_cast<float>(code));
          best = std::min(best, std::abs(problem.w(r, j) - level));
        }
        EXPECT_EQ(std::abs(problem.w(r, j) - got[j]), best);
      }
    }
  }
}

}  // namespace
}  // namespace certiq::engine
