// What a certificate says of tokens that the fit has not seen (V4).

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <string>
#include <vector>

#include "tests/engine/problems.h"

namespace certiq::engine {
namespace {

using testing::Inputs;
using testing::MakeLayer;
using testing::RandomLayer;

bool Warns(const QuantizedLayer& layer, const std::string& of) {
  const std::vector<std::string>& warnings = layer.certificate.warnings;
  return std::any_of(warnings.begin(), warnings.end(),
                     [&](const std::string& warning) { return warning.starts_with(of); });
}

ResolvedSpec With(Method method, double relative_trace) {
  ResolvedSpec spec;
  spec.method = method;
  spec.damping_value = relative_trace;
  return spec;
}

// Relative error on other tokens.
double ErrorOn(const textbook::Matrix& x, const RandomLayer& problem, const QuantizedLayer& layer) {
  const std::vector<double> q = testing::TensorValues(layer, "weight");
  double squared = 0;
  double energy = 0;
  for (int64_t r = 0; r < problem.w.rows; ++r) {
    std::vector<double> w = testing::Row(problem.w, r);
    energy += textbook::SquaredImage(x, w);
    for (size_t j = 0; j < w.size(); ++j) w[j] -= q[static_cast<size_t>(r) * w.size() + j];
    squared += textbook::SquaredImage(x, w);
  }
  return std::sqrt(squared / energy);
}

TEST(UnseenTokensTest, FewTokensAreSaidForEveryMethodWithFeedback) {
  constexpr int64_t kFeatures = 24;
  for (const Method method : {Method::kOptq, Method::kQronos, Method::kNearest}) {
    for (const int64_t tokens : {1L, 23L, 24L, 95L, 96L, 400L}) {
      RandomLayer problem = MakeLayer(tokens, kFeatures, 6, Inputs::kCorrelated, 1061);
      const auto layer = testing::Quantize(problem, With(method, 0.01));
      ASSERT_TRUE(layer.ok()) << layer.status();
      EXPECT_EQ(Warns(*layer, "few tokens"), method != Method::kNearest && tokens < 4 * kFeatures)
          << tokens;
    }
  }
}

TEST(UnseenTokensTest, DeadFeaturesNeedNoTokens) {
  RandomLayer problem = MakeLayer(60, 24, 6, Inputs::kGaussian, 1063);
  for (int64_t t = 0; t < 60; ++t) {
    for (int64_t j = 12; j < 24; ++j) problem.x(t, j) = 0;
  }
  const auto layer = testing::Quantize(problem, With(Method::kOptq, 0.01));
  ASSERT_TRUE(layer.ok()) << layer.status();
  EXPECT_FALSE(Warns(*layer, "few tokens"));
}

TEST(UnseenTokensTest, WarningSaysWhatHelps) {
  const auto layer =
      testing::Quantize(MakeLayer(30, 24, 6, Inputs::kGaussian, 1069), With(Method::kOptq, 0.01));
  ASSERT_TRUE(layer.ok()) << layer.status();
  ASSERT_EQ(layer->certificate.warnings.size(), 1u);
  const std::string& warning = layer->certificate.warnings[0];
  for (const char* part :
       {"30 for 24 features", "calibration tokens", "held_out", "lambda", "METHOD_NEAREST"}) {
    EXPECT_NE(warning.find(part), std::string::npos) << warning;
  }
}

// Inputs without correlation, where feedback has nothing to gain and only fits.
class HeldOutNearestTest : public ::testing::TestWithParam<Order> {
 protected:
  static RandomLayer Uncorrelated(int64_t tokens, int64_t held_out) {
    RandomLayer problem = MakeLayer(tokens, 32, 80, Inputs::kGaussian, 1087);
    problem.held_x = MakeLayer(held_out, 32, 1, Inputs::kGaussian, 1091).x;
    return problem;
  }
};

TEST_P(HeldOutNearestTest, IsThatOfPlainRounding) {
  for (const int group : {0, 8}) {
    for (const ScaleRule scale : {ScaleRule::kAbsmax, ScaleRule::kCompensated}) {
      const RandomLayer problem = Uncorrelated(40, 500);
      ResolvedSpec spec = With(Method::kOptq, 1e-4);
      spec.order = GetParam();
      spec.group_size = group;
      spec.scale = scale;
      spec.rounding = Rounding::kStochastic;
      const auto layer = testing::Quantize(problem, spec);
      ResolvedSpec plain = With(Method::kNearest, 0);
      plain.group_size = group;
      const auto rounded = testing::Quantize(problem, plain);
      ASSERT_TRUE(layer.ok() && rounded.ok());
      const double expected = ErrorOn(problem.held_x, problem, *rounded);
      EXPECT_NEAR(*layer->certificate.held_out_nearest_relative_error, expected, 1e-4 * expected);
      EXPECT_FALSE(rounded->certificate.held_out_nearest_relative_error.has_value());
      EXPECT_GT(*layer->certificate.held_out_relative_error, expected);
      EXPECT_TRUE(Warns(*layer, "worse than plain rounding on the held-out tokens"));
    }
  }
}

TEST_P(HeldOutNearestTest, SearchesForDampingSayItToo) {
  for (const bool all : {true, false}) {
    const RandomLayer problem = Uncorrelated(40, 500);
    ResolvedSpec spec = With(Method::kOptq, 0);
    spec.order = GetParam();
    spec.damping_rule = DampingRule::kHeldOut;
    // A ladder that ends where damping is much too small, and one that reaches plain rounding: with
    // lambda far above trace / N feedback vanishes.
    spec.damping_candidates = all ? std::vector<double>{1e-4, 1e8} : std::vector<double>{1e-4};
    const auto layer = testing::Quantize(problem, spec);
    ASSERT_TRUE(layer.ok()) << layer.status();
    const LayerCertificate& c = layer->certificate;
    ASSERT_TRUE(c.held_out_nearest_relative_error.has_value());
    if (all) {
      EXPECT_NEAR(*c.held_out_relative_error, *c.held_out_nearest_relative_error,
                  1e-4 * *c.held_out_nearest_relative_error);
    } else {
      EXPECT_GT(*c.held_out_relative_error, *c.held_out_nearest_relative_error);
    }
    EXPECT_EQ(Warns(*layer, "worse than plain rounding on the held-out tokens"),
              *c.held_out_relative_error > *c.held_out_nearest_relative_error);
  }
}

INSTANTIATE_TEST_SUITE_P(Orders, HeldOutNearestTest,
                         ::testing::Values(Order::kNatural, Order::kDecreasingNorm));

}  // namespace
}  // namespace certiq::engine
