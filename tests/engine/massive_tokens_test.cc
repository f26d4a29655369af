// Tokens that are many times as large as the others: sums, certified errors, bounds and what
// rounding may account for (R1), against the tokens in float64.

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <numeric>
#include <vector>

#include "engine/gram/form_rounding.h"
#include "tests/engine/problems.h"

namespace certiq::engine {
namespace {

using testing::Inputs;
using testing::MakeLayer;
using testing::RandomLayer;

constexpr double kFloat32 = 0x1p-24;
constexpr double kFloat64 = 0x1p-53;
// What the sweep's float32 arithmetic may leave of a squared error: up to there the residual of the
// identity counts as healthy.
constexpr double kEvaluated = 1e-3;
// What float32 forms leave of an energy.
constexpr double kEvaluation = 1e-4;

void Enlarge(textbook::Matrix& x, const std::vector<int64_t>& tokens, double times) {
  for (const int64_t t : tokens) {
    for (int64_t j = 0; j < x.cols; ++j) x(t, j) = static_cast<float>(times * x(t, j));
  }
}

// |X w - X~ q|^2 of a row, token by token.
double RowError(const RandomLayer& problem, const std::vector<double>& q, int64_t r) {
  double error = 0;
  for (int64_t t = 0; t < problem.x.rows; ++t) {
    double out = 0;
    for (int64_t j = 0; j < problem.x.cols; ++j) {
      // Small differences first: what massive tokens have in common cancels exactly.
      const double level = q[static_cast<size_t>(r * problem.w.cols + j)];
      out += problem.x(t, j) * (problem.w(r, j) - level) +
             (problem.x(t, j) - problem.inputs()(t, j)) * level;
    }
    error += out * out;
  }
  return error;
}

double RowEnergy(const RandomLayer& problem, int64_t r) {
  return textbook::SquaredImage(problem.x, testing::Row(problem.w, r));
}

// Every statement of a certificate about errors on the calibration tokens.
void ExpectTrueOfTokens(const RandomLayer& problem, const QuantizedLayer& layer, double accuracy) {
  const LayerCertificate& c = layer.certificate;
  const std::vector<double> q = testing::TensorValues(layer, "weight");
  double squared = 0;
  double energy = 0;
  for (int64_t r = 0; r < problem.w.rows; ++r) {
    const auto at = static_cast<size_t>(r);
    const double error = RowError(problem, q, r);
    EXPECT_LE(std::abs(c.row_error[at] * c.row_error[at] - error),
              c.row_rounding[at] + kEvaluated * error)
        << "row " << r;
    EXPECT_LE(std::sqrt(error), c.row_bound[at] * (1 + 1e-12)) << "row " << r;
    squared += error;
    energy += RowEnergy(problem, r);
  }
  EXPECT_LE(std::abs(c.squared_error - squared), c.squared_error_rounding + kEvaluated * squared);
  EXPECT_LE(std::abs(c.reference_energy - energy),
            c.reference_energy_rounding + 2 * kEvaluation * energy);
  EXPECT_LE(std::sqrt(squared), c.l2_bound * (1 + 1e-12));
  EXPECT_NEAR(c.relative_error, std::sqrt(squared / energy),
              accuracy * std::sqrt(squared / energy));
}

struct Damping {
  DampingRule rule;
  double value;
};

TEST(MassiveTokensTest, CertificateIsThatOfTheTokens) {
  const std::vector<int64_t> places[] = {{7}, {399}, {0, 1, 2, 150, 399}};
  for (const double times : {1e2, 1e3, 1e4, 1e5, 1e6}) {
    for (const auto& tokens : places) {
      for (const Method method : {Method::kOptq, Method::kNearest}) {
        for (const Damping damping :
             {Damping{DampingRule::kRelativeTrace, 1e-2},
              Damping{DampingRule::kRelativeTrace, 1e-8},
              Damping{DampingRule::kRelativeTrace, 1e-12}, Damping{DampingRule::kAbsolute, 0}}) {
          RandomLayer problem = MakeLayer(400, 48, 40, Inputs::kGaussian, 1009);
          Enlarge(problem.x, tokens, times);
          ResolvedSpec spec;
          spec.method = method;
          spec.bits = 8;
          spec.order = Order::kDecreasingNorm;
          spec.damping_rule = damping.rule;
          spec.damping_value = damping.value;
          const auto layer = testing::Quantize(problem, spec);
          ASSERT_TRUE(layer.ok()) << layer.status();
          SCOPED_TRACE(times);
          SCOPED_TRACE(damping.value);
          ExpectTrueOfTokens(problem, *layer, 5e-4);
          // It is told that errors are known, not only that they may be unknown: of the ordinary
          // tokens no more than (sum |d_j| |X_j|)^2 <= N |d|^2 max |X_j|^2 could be lost, and
          // float64 leaves 2^-53 (400 + 112) N of what massive ones have.
          EXPECT_LT(layer->certificate.squared_error_rounding,
                    0.02 * layer->certificate.squared_error);
        }
      }
    }
  }
}

TEST(MassiveTokensTest, CertificateIsThatOfMismatchedTokens) {
  for (const double times : {1e3, 1e5}) {
    for (const Method method : {Method::kOptq, Method::kQronos, Method::kNearest}) {
      RandomLayer problem = MakeLayer(400, 40, 40, Inputs::kGaussian, 1013);
      problem.x_quantized = testing::Disturbed(problem.x, 0.1, 1019);
      Enlarge(problem.x, {7, 300}, times);
      Enlarge(problem.x_quantized, {7, 300}, times);
      ResolvedSpec spec;
      spec.method = method;
      spec.bits = 8;
      spec.damping_value = 1e-10;
      const auto layer = testing::Quantize(problem, spec);
      ASSERT_TRUE(layer.ok()) << layer.status();
      SCOPED_TRACE(times);
      ExpectTrueOfTokens(problem, *layer, 5e-4);
    }
  }
}

// Held-out tokens are certified by the same sums.
TEST(MassiveTokensTest, HeldOutErrorIsThatOfTheTokens) {
  RandomLayer problem = MakeLayer(400, 48, 40, Inputs::kGaussian, 1021);
  RandomLayer unseen = problem;
  unseen.x = MakeLayer(200, 48, 1, Inputs::kGaussian, 1031).x;
  for (int64_t j = 0; j < 48; ++j) unseen.x(9, j) = problem.x(9, j);
  Enlarge(problem.x, {9}, 1e5);
  Enlarge(unseen.x, {9}, 1e5);
  problem.held_x = unseen.x;
  ResolvedSpec spec;
  spec.bits = 8;
  spec.damping_value = 1e-10;
  const auto layer = testing::Quantize(problem, spec);
  ASSERT_TRUE(layer.ok()) << layer.status();
  const std::vector<double> q = testing::TensorValues(*layer, "weight");
  double squared = 0;
  double energy = 0;
  for (int64_t r = 0; r < 40; ++r) {
    squared += RowError(unseen, q, r);
    energy += RowEnergy(unseen, r);
  }
  EXPECT_NEAR(*layer->certificate.held_out_relative_error, std::sqrt(squared / energy),
              5e-4 * std::sqrt(squared / energy));
}

// No token stands out, and still float32 sums do not have the error: features are copies of each
// other but for a millionth. Then the certificate says what it does not know, and its bounds hold.
TEST(FormRoundingTest, HoldsWhereSumsLeaveNothingOfTheError) {
  for (const double apart : {1e-2, 1e-4, 1e-6}) {
    for (const Method method : {Method::kOptq, Method::kNearest}) {
      RandomLayer problem = MakeLayer(600, 32, 40, Inputs::kGaussian, 1033);
      for (int64_t t = 0; t < 600; ++t) {
        for (int64_t j = 1; j < 32; ++j) {
          problem.x(t, j) = static_cast<float>(problem.x(t, 0) + apart * problem.x(t, j));
        }
      }
      ResolvedSpec spec;
      spec.method = method;
      spec.damping_value = 1e-12;
      // What float32 sums lose may make H indefinite until lambda covers it.
      spec.max_attempts = 10;
      const auto layer = testing::Quantize(problem, spec);
      ASSERT_TRUE(layer.ok()) << layer.status();
      SCOPED_TRACE(apart);
      const LayerCertificate& c = layer->certificate;
      ExpectTrueOfTokens(problem, *layer, 2 * c.squared_error_rounding / c.squared_error + 5e-4);
    }
  }
}

// Sums: of ordinary tokens as well as float32 has them, of massive ones as float64.
TEST(MassiveTokensTest, SumsKeepTheOrdinaryTokens) {
  for (const int64_t tokens : {5, 40, 1000, 2000}) {
    textbook::Matrix x = MakeLayer(tokens, 30, 1, Inputs::kGaussian, 1039).x;
    const textbook::Matrix ordinary = x;
    const std::vector<int64_t> massive = {0, tokens - 1};
    Enlarge(x, massive, 1e5);
    const Statistics sums = testing::Accumulate(x, 17);
    const textbook::Matrix truth = textbook::Gram(x);
    textbook::Matrix rest = ordinary;
    for (const int64_t t : massive) {
      for (int64_t j = 0; j < 30; ++j) rest(t, j) = 0;
    }
    const textbook::Matrix others = textbook::Gram(rest);
    for (int64_t i = 0; i < 30; ++i) {
      for (int64_t j = i; j < 30; ++j) {
        const double narrow = 16 * kFloat32 * std::sqrt(others(i, i) * others(j, j));
        const double wide =
            2 * static_cast<double>(tokens + 16) * kFloat64 * std::sqrt(truth(i, i) * truth(j, j));
        ASSERT_LE(std::abs(sums.gram.at(i, j) - truth(i, j)), narrow + wide) << i << ", " << j;
      }
      ASSERT_FALSE(sums.massive_squares.empty());
      EXPECT_LE(sums.massive_squares[static_cast<size_t>(i)],
                sums.gram.at(i, i) * (1 + 4 * kFloat64 * static_cast<double>(tokens)));
    }
    EXPECT_TRUE(HasMassiveTokens(sums));
  }
}

// Nearly half of the rows a thousand times the others, or most of them padding.
TEST(MassiveTokensTest, AlternatingAndEmptyRowsAreSummedToo) {
  for (const int64_t period : {2, 16}) {
    textbook::Matrix x = MakeLayer(1920, 20, 1, Inputs::kGaussian, 1049).x;
    for (int64_t t = 0; t < x.rows; ++t) {
      for (int64_t j = 0; j < x.cols; ++j) {
        if (period == 2 && t % 5 < 2) x(t, j) = static_cast<float>(1e3 * x(t, j));
        if (period == 16 && t % 16 != 0) x(t, j) = 0;
      }
    }
    const Statistics sums = testing::Accumulate(x);
    const textbook::Matrix truth = textbook::Gram(x);
    for (int64_t i = 0; i < 20; ++i) {
      for (int64_t j = i; j < 20; ++j) {
        ASSERT_NEAR(sums.gram.at(i, j), truth(i, j),
                    17 * kFloat32 * std::sqrt(truth(i, i) * truth(j, j)));
      }
    }
    // Two of five rows may be massive; padding does not make other rows so.
    EXPECT_EQ(HasMassiveTokens(sums), period == 2);
    EXPECT_EQ(sums.massive_squares.empty(), period == 16);
  }
}

// What is known of massive tokens survives merging and another order of features.
TEST(MassiveTokensTest, SquaresFollowTheSums) {
  SerialExecutor serial;
  textbook::Matrix x = MakeLayer(100, 6, 1, Inputs::kGaussian, 1051).x;
  const Statistics plain = testing::Accumulate(x);
  ASSERT_TRUE(plain.massive_squares.empty());
  Enlarge(x, {3}, 1e4);
  const Statistics massive = testing::Accumulate(x);
  ASSERT_EQ(massive.massive_squares.size(), 6u);
  for (int64_t j = 0; j < 6; ++j) {
    EXPECT_EQ(massive.massive_squares[static_cast<size_t>(j)], x(3, j) * x(3, j));
  }
  EXPECT_EQ(Sum(plain, massive, serial).massive_squares, massive.massive_squares);
  EXPECT_EQ(Sum(massive, plain, serial).massive_squares, massive.massive_squares);
  Statistics merged = plain;
  Merge(massive, merged);
  Merge(massive, merged);
  const std::vector<int64_t> order = {5, 3, 1, 0, 2, 4};
  const Statistics permuted = Permute(merged, order, serial);
  for (size_t i = 0; i < order.size(); ++i) {
    EXPECT_EQ(permuted.massive_squares[i],
              2 * massive.massive_squares[static_cast<size_t>(order[i])]);
  }
}

}  // namespace
}  // namespace certiq::engine
