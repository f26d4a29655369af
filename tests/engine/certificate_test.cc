// Certified numbers against a float64 recomputation from the raw tokens.

#include "engine/certificate.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>

#include "tests/engine/problems.h"

namespace certiq::engine {
namespace {

using testing::Inputs;
using testing::MakeLayer;

// The contract: certified errors equal a float64 recomputation to 1e-4.
constexpr double kContract = 1e-4;

void ExpectTrue(const testing::RandomLayer& problem, const QuantizedLayer& layer) {
  const LayerCertificate& c = layer.certificate;
  const int64_t n = problem.w.cols;
  const std::vector<double> weight = testing::TensorValues(layer, "weight");
  const std::vector<double> scales = testing::TensorValues(layer, "scales");
  textbook::Matrix h = textbook::Gram(problem.x);
  for (int64_t j = 0; j < n; ++j) h(j, j) += c.lambda_used;
  textbook::Matrix u;
  std::vector<double> d;
  ASSERT_TRUE(textbook::ReverseFactor(h, u, d));

  double energy = 0;
  double squared = 0;
  double damped = 0;
  double bound = 0;
  int64_t clipped = 0;
  for (int64_t r = 0; r < problem.w.rows; ++r) {
    const std::vector<double> w = testing::Row(problem.w, r);
    std::vector<double> change(w.size());
    for (size_t j = 0; j < w.size(); ++j) {
      change[j] = w[j] - weight[static_cast<size_t>(r * n) + j];
    }
    const double error = textbook::SquaredImage(problem.x, change);
    double row_bound = 0;
    double norm = 0;
    for (int64_t j = 0; j < n; ++j) {
      // e = (w - q) U, (M3) read backwards.
      double e = 0;
      for (int64_t k = 0; k <= j; ++k) e += change[static_cast<size_t>(k)] * u(k, j);
      const double step = scales[static_cast<size_t>(r * c.spec.Groups(n) + c.spec.GroupOf(j))];
      const double eps = std::max(step / 2, std::abs(e));
      row_bound += eps * eps * d[static_cast<size_t>(j)];
      clipped += std::abs(e) > step / 2 * (1 + 1e-6) ? 1 : 0;
      norm += change[static_cast<size_t>(j)] * change[static_cast<size_t>(j)];
    }
    energy += textbook::SquaredImage(problem.x, w);
    squared += error;
    damped += error + c.lambda_used * norm;
    bound += row_bound;
    const auto at = static_cast<size_t>(r);
    EXPECT_NEAR(c.row_error[at], std::sqrt(error), kContract * std::sqrt(error) + 1e-12);
    EXPECT_NEAR(c.row_bound[at], std::sqrt(row_bound), kContract * std::sqrt(row_bound));
    EXPECT_GE(c.row_bound[at], std::sqrt(error));
    EXPECT_GE(c.row_bound[at], std::sqrt(error + c.lambda_used * norm));
  }
  EXPECT_NEAR(c.reference_energy, energy, kContract * energy);
  EXPECT_NEAR(c.squared_error, squared, kContract * squared);
  EXPECT_NEAR(c.damped_squared_error, damped, kContract * damped);
  EXPECT_NEAR(c.l2_bound, std::sqrt(bound), kContract * std::sqrt(bound));
  EXPECT_GE(c.l2_bound, std::sqrt(damped));
  EXPECT_NEAR(c.relative_error, std::sqrt(squared / energy), kContract * c.relative_error);
  // Targets within float32's rounding of the grid's edge may count either way.
  EXPECT_NEAR(static_cast<double>(c.clipped_weights), static_cast<double>(clipped),
              1 + 0.01 * static_cast<double>(clipped));
  EXPECT_LE(c.identity_residual, kContract);
  double sum = 0;
  for (const double v : d) sum += v;
  EXPECT_NEAR(c.c2, std::sqrt(sum / static_cast<double>(n)), kContract * c.c2);
  EXPECT_NEAR(c.c_inf, std::sqrt(*std::max_element(d.begin(), d.end())), kContract * c.c_inf);
}

TEST(CertificateTest, EqualsARecomputationFromTheTokens) {
  uint64_t seed = 61;
  for (const Inputs inputs : {Inputs::kGaussian, Inputs::kCorrelated, Inputs::kRankDeficient}) {
    for (int bits = 2; bits <= 8; ++bits) {
      for (const int group : {0, 24}) {
        ResolvedSpec spec;
        spec.bits = bits;
        spec.symmetric = bits % 2 == 0;
        spec.group_size = group;
        const auto problem = MakeLayer(180, 90, 14, inputs, seed++);
        const auto layer = testing::Quantize(problem, spec);
        ASSERT_TRUE(layer.ok()) << layer.status();
        ExpectTrue(problem, *layer);
      }
    }
  }
}

// A large lambda makes damped and undamped errors differ by orders of
// magnitude: their difference may not lose the digits.
TEST(CertificateTest, KeepsItsDigitsWhenDampingDominates) {
  for (const double relative : {1.0, 100.0, 1e5}) {
    ResolvedSpec spec;
    spec.damping_value = relative;
    const auto problem = MakeLayer(180, 90, 14, Inputs::kCorrelated, 67);
    const auto layer = testing::Quantize(problem, spec);
    ASSERT_TRUE(layer.ok()) << layer.status();
    ExpectTrue(problem, *layer);
  }
}

// Every weight half a step outside its grid: each error is exactly half a step
// or more, so the bound is attained and any smaller constant would be false.
TEST(CertificateTest, BoundIsAttainedByOneWeightARow) {
  testing::RandomLayer problem = MakeLayer(50, 1, 20, Inputs::kGaussian, 71);
  const auto layer = testing::Quantize(problem, {});
  ASSERT_TRUE(layer.ok());
  const LayerCertificate& c = layer->certificate;
  for (size_t r = 0; r < 20; ++r) {
    if (problem.w(static_cast<int64_t>(r), 0) < 0) continue;
    const double damped = std::sqrt(c.row_error[r] * c.row_error[r] * 1.01);
    EXPECT_NEAR(damped / c.row_bound[r], 1, 1e-5);
    EXPECT_LE(c.row_error[r], c.row_bound[r]);
  }
}

TEST(CertificateTest, CountsClippingAndStillBounds) {
  // Each feature of the second half has to make up for one twenty times as
  // large: its targets leave the grid.
  testing::RandomLayer problem = MakeLayer(400, 60, 10, Inputs::kGaussian, 73);
  for (int64_t t = 0; t < 400; ++t) {
    for (int64_t j = 0; j < 30; ++j) {
      problem.x(t, j) = static_cast<float>(20 * problem.x(t, 30 + j) + 0.01 * problem.x(t, j));
    }
  }
  ResolvedSpec spec;
  spec.bits = 2;
  spec.damping_value = 1e-5;
  const auto layer = testing::Quantize(problem, spec);
  ASSERT_TRUE(layer.ok());
  EXPECT_GT(layer->certificate.clipped_weights, 20);
  EXPECT_GT(layer->certificate.clipped_rows, 5);
  EXPECT_GT(layer->certificate.worst_overshoot, 0.1);
  ExpectTrue(problem, *layer);
}

TEST(CertificateTest, PlainRoundingsErrorIsTheTextbooks) {
  ResolvedSpec spec;
  spec.bits = 3;
  spec.compare_nearest = true;
  const auto problem = MakeLayer(180, 90, 14, Inputs::kCorrelated, 79);
  const auto layer = testing::Quantize(problem, spec);
  ASSERT_TRUE(layer.ok());
  double squared = 0;
  double energy = 0;
  for (int64_t r = 0; r < 14; ++r) {
    std::vector<double> w = testing::Row(problem.w, r);
    energy += textbook::SquaredImage(problem.x, w);
    const auto grid = textbook::AbsmaxGrid(w, 3, true, 0);
    for (int64_t j = 0; j < 90; ++j) {
      double& value = w[static_cast<size_t>(j)];
      value -= grid.Level(j, grid.Code(j, value));
    }
    squared += textbook::SquaredImage(problem.x, w);
  }
  EXPECT_NEAR(*layer->certificate.nearest_relative_error, std::sqrt(squared / energy),
              kContract * std::sqrt(squared / energy));
}

}  // namespace
}  // namespace certiq::engine
