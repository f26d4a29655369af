// The probabilistic and alphabet bounds, and the predictions.

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>

#include "tests/engine/problems.h"

namespace certiq::engine {
namespace {

using testing::Inputs;
using testing::MakeLayer;
using testing::RandomLayer;

ResolvedSpec Stochastic(uint64_t seed) {
  ResolvedSpec spec;
  spec.rounding = Rounding::kStochastic;
  spec.seed = seed;
  return spec;
}

// max over tokens and rows of |x (w - q)|.
double LargestError(const RandomLayer& problem, const QuantizedLayer& layer) {
  const auto weight = testing::TensorValues(layer, "weight");
  double largest = 0;
  for (int64_t t = 0; t < problem.x.rows; ++t) {
    for (int64_t r = 0; r < problem.w.rows; ++r) {
      double sum = 0;
      for (int64_t j = 0; j < problem.w.cols; ++j) {
        sum += problem.x(t, j) *
               (problem.w(r, j) - weight[static_cast<size_t>(r * problem.w.cols + j)]);
      }
      largest = std::max(largest, std::abs(sum));
    }
  }
  return largest;
}

TEST(StochasticTest, ASeedReproducesAndAnotherDiffers) {
  const RandomLayer problem = MakeLayer(100, 70, 40, Inputs::kCorrelated, 331);
  testing::ContraryExecutor contrary;
  const auto a = testing::Quantize(problem, Stochastic(7));
  const auto b = testing::Quantize(problem, Stochastic(7), &contrary);
  const auto c = testing::Quantize(problem, Stochastic(8));
  ASSERT_TRUE(a.ok() && b.ok() && c.ok());
  EXPECT_EQ(a->tensors[0].bytes, b->tensors[0].bytes);
  EXPECT_NE(a->tensors[0].bytes, c->tensors[0].bytes);
}

// Without feedback every level is w on average: over S seeds the mean differs
// from w by less than 5 standard errors, each at most step / (2 sqrt(S)).
TEST(StochasticTest, IsUnbiased) {
  const RandomLayer problem = MakeLayer(50, 20, 10, Inputs::kGaussian, 337);
  constexpr int kSeeds = 400;
  std::vector<double> mean(200, 0.0);
  std::vector<double> scales;
  for (int seed = 0; seed < kSeeds; ++seed) {
    ResolvedSpec spec = Stochastic(static_cast<uint64_t>(seed));
    spec.method = Method::kNearest;
    const auto layer = testing::Quantize(problem, spec);
    ASSERT_TRUE(layer.ok());
    const auto weight = testing::TensorValues(*layer, "weight");
    for (size_t i = 0; i < mean.size(); ++i) mean[i] += weight[i] / kSeeds;
    scales = testing::TensorValues(*layer, "scales");
  }
  for (int64_t r = 0; r < 10; ++r) {
    const double step = scales[static_cast<size_t>(r)];
    for (int64_t j = 0; j < 20; ++j) {
      // The outermost half step is clipped, not unbiased.
      if (problem.w(r, j) > 7 * step) continue;
      EXPECT_NEAR(mean[static_cast<size_t>(r * 20 + j)], problem.w(r, j),
                  5 * step / (2 * std::sqrt(kSeeds)));
    }
  }
}

// (B5) by Monte Carlo: at eps = 0.2 each seed may fail with probability 0.2
// at most; of 200, more than 75 would have probability below 1e-8.
TEST(StochasticTest, LargestErrorStaysWithinItsBoundWithItsProbability) {
  for (const int bits : {2, 4}) {
    const RandomLayer problem = MakeLayer(40, 24, 6, Inputs::kCorrelated, 347);
    int beyond = 0;
    for (uint64_t seed = 0; seed < 200; ++seed) {
      ResolvedSpec spec = Stochastic(seed);
      spec.bits = bits;
      spec.failure_probability = 0.2;
      const auto layer = testing::Quantize(problem, spec);
      ASSERT_TRUE(layer.ok());
      EXPECT_NEAR(*layer->certificate.linf_probability, 0.8, 1e-12);
      beyond += LargestError(problem, *layer) > *layer->certificate.linf_bound ? 1 : 0;
      for (size_t r = 0; r < 6; ++r) {
        ASSERT_LE(layer->certificate.row_error[r], layer->certificate.row_bound[r]);
      }
    }
    EXPECT_LE(beyond, 75);
  }
}

// (B5)'s value, recomputed: sqrt(ln(2 m R / eps) / 2) max delta sqrt(D) where nothing clips.
TEST(StochasticTest, LargestErrorBoundIsTheFormula) {
  RandomLayer problem = MakeLayer(2000, 40, 4, Inputs::kGaussian, 349);
  ResolvedSpec spec = Stochastic(3);
  spec.bits = 8;
  // One large weight a row sets the step, and nothing comes near the edge.
  for (int64_t r = 0; r < 4; ++r) problem.w(r, 0) = -1;
  const auto layer = testing::Quantize(problem, spec);
  ASSERT_TRUE(layer.ok());
  ASSERT_EQ(layer->certificate.clipped_weights, 0);
  const double step = 2.0 / 255;
  const double expected =
      std::sqrt(0.5 * std::log(2 * 2000 * 4 / 1e-3)) * step * layer->certificate.c_inf;
  EXPECT_NEAR(*layer->certificate.linf_bound,
              std::min(expected, *std::max_element(layer->certificate.row_bound.begin(),
                                                   layer->certificate.row_bound.end())),
              1e-4 * expected);
}

// (B7): X = Hadamard / sqrt(N), every weight just under half a step. Nearest rounding sends all
// to zero and loses (delta / 2) sqrt(N) on the constant row; stochastic rounding does not.
TEST(StochasticTest, HadamardExampleSeparatesNearestFromStochastic) {
  constexpr int64_t kN = 256;
  RandomLayer problem;
  problem.x = textbook::Matrix(kN, kN);
  problem.w = textbook::Matrix(2, kN);
  for (int64_t i = 0; i < kN; ++i) {
    for (int64_t j = 0; j < kN; ++j) {
      const int parity = __builtin_popcountll(static_cast<uint64_t>(i & j)) % 2;
      problem.x(i, j) = (parity == 0 ? 1.0 : -1.0) / 16;
    }
  }
  for (int64_t r = 0; r < 2; ++r) {
    for (int64_t j = 0; j < kN; ++j) problem.w(r, j) = static_cast<float>(0.499);
  }
  ResolvedSpec spec;
  spec.grid = std::make_shared<const ExplicitGrid>(
      ExplicitGrid{{1.0f, 1.0f}, {}, std::nullopt, std::nullopt});
  spec.damping_rule = DampingRule::kAbsolute;
  spec.damping_value = 1e-3;
  const auto nearest = testing::Quantize(problem, spec);
  ASSERT_TRUE(nearest.ok()) << nearest.status();
  EXPECT_NEAR(LargestError(problem, *nearest), 0.499 * std::sqrt(kN), 1e-3);
  EXPECT_LE(LargestError(problem, *nearest), *nearest->certificate.linf_bound);
  EXPECT_EQ(*nearest->certificate.linf_probability, 1);

  spec.rounding = Rounding::kStochastic;
  double worst = 0;
  for (uint64_t seed = 0; seed < 20; ++seed) {
    spec.seed = seed;
    const auto stochastic = testing::Quantize(problem, spec);
    ASSERT_TRUE(stochastic.ok());
    const double error = LargestError(problem, *stochastic);
    worst = std::max(worst, error);
    EXPECT_LE(error, *stochastic->certificate.linf_bound);
    EXPECT_LT(*stochastic->certificate.linf_bound, 0.499 * std::sqrt(kN));
  }
  EXPECT_LT(worst, 0.7 * 0.499 * std::sqrt(kN));
}

// (B6): at the bits it names, with the same steps, nothing clips.
TEST(AlphabetTest, NothingClipsAtTheBitsNeeded) {
  for (const bool symmetric : {true, false}) {
    for (const Rounding rounding : {Rounding::kNearest, Rounding::kStochastic}) {
      const RandomLayer problem = MakeLayer(300, 24, 10, Inputs::kCorrelated, 353);
      ResolvedSpec spec;
      spec.bits = 2;
      spec.symmetric = symmetric;
      spec.rounding = rounding;
      spec.damping_value = 0.1;
      const auto tight = testing::Quantize(problem, spec);
      ASSERT_TRUE(tight.ok());
      ASSERT_TRUE(tight->certificate.bits_needed.has_value());
      EXPECT_GT(tight->certificate.clipped_weights, 0);
      const int needed = *tight->certificate.bits_needed;
      ASSERT_GT(needed, 2);
      ASSERT_LE(needed, 8) << "the example is meant to fit";
      ExplicitGrid grid;
      for (const double s : testing::TensorValues(*tight, "scales")) {
        grid.scales.push_back(static_cast<float>(s));
      }
      // Room on both sides; the true range is within the count of levels.
      if (!symmetric) grid.zero_points.assign(grid.scales.size(), 1 << (8 - 1));
      spec.grid = std::make_shared<const ExplicitGrid>(grid);
      spec.bits = symmetric ? needed : 8;
      const auto wide = testing::Quantize(problem, spec);
      ASSERT_TRUE(wide.ok()) << wide.status();
      EXPECT_EQ(wide->certificate.clipped_weights, 0);
    }
  }
}

// Tight where it can be: one feature has no feedback, and absmax needs exactly b bits.
TEST(AlphabetTest, IsTheGridsOwnBitsWithoutFeedback) {
  for (int bits = 2; bits <= 8; ++bits) {
    RandomLayer problem = MakeLayer(30, 1, 6, Inputs::kGaussian, 359);
    for (double& v : problem.w.values) v = std::abs(v);
    ResolvedSpec spec;
    spec.bits = bits;
    const auto layer = testing::Quantize(problem, spec);
    ASSERT_TRUE(layer.ok());
    EXPECT_EQ(*layer->certificate.bits_needed, bits);
  }
}

// (P1) predicts the damped error of a fine grid; (P2) is what equal steps lose.
TEST(PredictionTest, HighRateErrorAndRateGap) {
  const RandomLayer problem = MakeLayer(600, 120, 60, Inputs::kCorrelated, 367);
  for (const Rounding rounding : {Rounding::kNearest, Rounding::kStochastic}) {
    ResolvedSpec spec;
    spec.bits = 6;
    spec.rounding = rounding;
    const auto layer = testing::Quantize(problem, spec);
    ASSERT_TRUE(layer.ok());
    const LayerCertificate& c = layer->certificate;
    EXPECT_NEAR(c.damped_squared_error / *c.predicted_squared_error, 1, 0.08);
    textbook::Matrix h = textbook::Gram(problem.x);
    for (int64_t j = 0; j < 120; ++j) h(j, j) += c.lambda_used;
    textbook::Matrix u;
    std::vector<double> d;
    ASSERT_TRUE(textbook::ReverseFactor(h, u, d));
    double mean = 0;
    double logs = 0;
    for (const double v : d) {
      mean += v / 120;
      logs += std::log2(v) / 120;
    }
    EXPECT_NEAR(*c.rate_gap_bits, 0.5 * (std::log2(mean) - logs), 1e-5);
  }
}

}  // namespace
}  // namespace certiq::engine
