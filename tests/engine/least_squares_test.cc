// The two ways to what least squares adds to W: row by row, and through one matrix for all rows.

#include "engine/methods/least_squares.h"

#include <gtest/gtest.h>

#include <cmath>
#include <optional>
#include <utility>
#include <vector>

#include "engine/linalg/damped_factor.h"
#include "tests/engine/problems.h"

namespace certiq::engine {
namespace {

using testing::Inputs;
using testing::MakeLayer;

struct Solved {
  LeastSquares by_row;
  LeastSquares together;
  Factor factor;
};

// Both ways, of `rows` weights on activations and disturbed ones; lambda is `ratio` trace / N.
std::optional<Solved> Solve(const testing::RandomLayer& layer, double ratio) {
  const Statistics sums = testing::AccumulatePair(layer.x, layer.x_quantized);
  testing::ContraryExecutor executor;
  RunContext context;
  context.executor = &executor;
  const std::vector<bool> dead(static_cast<size_t>(sums.features()));
  auto attempt =
      FactorDamped(sums.gram, dead, ratio * MeanDiagonal(sums.gram), FactorUse::kCertify, context);
  if (!attempt.ok() || attempt->cause != StabilityCause::kNone) return std::nullopt;
  const StripMatrix weights = testing::Strips(layer.w);
  auto initial = ComputeInitialError(sums, Widen(weights, executor), Phase::kRound, context);
  if (!initial.ok()) return std::nullopt;
  auto by_row = SolveRowByRow(*std::move(initial), attempt->factor, context);
  auto together = SolveTogether(sums, weights, attempt->factor, context);
  if (!by_row.ok() || !together.ok()) return std::nullopt;
  return Solved{*std::move(by_row), *std::move(together), std::move(attempt->factor)};
}

// sqrt(sum_j D_j o_j^2) of a row: what a norm of offsets counts.
double Norm(const Factor& factor, const std::vector<float>& offsets) {
  double sum = 0;
  for (size_t j = 0; j < offsets.size(); ++j) {
    sum += factor.d[j] * static_cast<double>(offsets[j]) * static_cast<double>(offsets[j]);
  }
  return std::sqrt(sum);
}

class LeastSquaresTest : public ::testing::TestWithParam<std::tuple<int64_t, double, Inputs>> {};

// A product in float32 of N terms is off by about sqrt(N) 2^-24 of |a||b|; D^-1 U^-1 X~^T P is
// float64, so nothing amplifies that. Rows of it are at most `kSpread` times as long as what
// they say of a w.
TEST_P(LeastSquaresTest, BothWaysAgree) {
  const auto [rows, ratio, inputs] = GetParam();
  constexpr int64_t kFeatures = 150;
  constexpr double kSpread = 100;
  const double tolerance = kSpread * std::sqrt(static_cast<double>(kFeatures)) * 0x1p-24;
  testing::RandomLayer layer = MakeLayer(400, kFeatures, rows, inputs, 7);
  layer.x_quantized = testing::Disturbed(layer.x, 0.4, 11);
  const auto solved = Solve(layer, ratio);
  ASSERT_TRUE(solved.has_value());
  std::vector<float> a(kFeatures);
  std::vector<float> b(kFeatures);
  for (int64_t r = 0; r < rows; ++r) {
    const auto at = static_cast<size_t>(r);
    solved->by_row.offsets.GetRow(r, a.data());
    solved->together.offsets.GetRow(r, b.data());
    std::vector<float> difference(kFeatures);
    for (size_t j = 0; j < difference.size(); ++j) difference[j] = a[j] - b[j];
    EXPECT_LE(Norm(solved->factor, difference), tolerance * Norm(solved->factor, a)) << r;
    const double m = solved->by_row.unchanged[at];
    EXPECT_NEAR(solved->together.unchanged[at], m, tolerance * m);
    EXPECT_NEAR(solved->together.floor[at], solved->by_row.floor[at], 2 * tolerance * m);
    EXPECT_GT(solved->by_row.floor[at], 0.05 * m) << "no row is to be solved twice here";
    const double scale = std::sqrt(m * solved->factor.d[0]);
    EXPECT_NEAR(solved->together.first_solved[at], solved->by_row.first_solved[at],
                tolerance * scale);
    EXPECT_NEAR(solved->together.first_product[at], solved->by_row.first_product[at],
                tolerance * std::abs(solved->by_row.first_product[at]) + 1e-12 * scale);
  }
}

INSTANTIATE_TEST_SUITE_P(
    Layers, LeastSquaresTest,
    ::testing::Combine(::testing::Values(1, 17, 70), ::testing::Values(1e-3, 0.1),
                       ::testing::Values(Inputs::kGaussian, Inputs::kCorrelated)));

// X a linear map of X~ but for a trace of noise: least squares undoes almost all of |P w|, and the
// difference that the floor is has no digits left in float32.
TEST(LeastSquaresCancellationTest, RowsThatWouldLoseDigitsAreSolvedInFloat64) {
  constexpr int64_t kFeatures = 140;
  constexpr int64_t kRows = 70;
  testing::RandomLayer layer = MakeLayer(300, kFeatures, kRows, Inputs::kGaussian, 23);
  layer.x_quantized = layer.x;
  for (int64_t t = 0; t < layer.x.rows; ++t) {
    for (int64_t j = 0; j + 1 < kFeatures; ++j) {
      layer.x(t, j) = static_cast<float>(layer.x(t, j) + 0.5 * layer.x_quantized(t, j + 1) +
                                         1e-4 * layer.x_quantized(t, j) *
                                             layer.x_quantized((t + 1) % layer.x.rows, j));
    }
  }
  const auto solved = Solve(layer, 1e-9);
  ASSERT_TRUE(solved.has_value());
  for (size_t r = 0; r < static_cast<size_t>(kRows); ++r) {
    ASSERT_LT(solved->by_row.floor[r], 1e-4 * solved->by_row.unchanged[r]);
    EXPECT_EQ(solved->together.floor[r], solved->by_row.floor[r]);
    EXPECT_EQ(solved->together.unchanged[r], solved->by_row.unchanged[r]);
    EXPECT_EQ(solved->together.first_solved[r], solved->by_row.first_solved[r]);
  }
}

}  // namespace
}  // namespace certiq::engine
