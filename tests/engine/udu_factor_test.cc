#include "engine/linalg/udu_factor.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <utility>

#include "tests/engine/problems.h"

namespace certiq::engine {
namespace {

using testing::Inputs;
using testing::MakeLayer;

UpperTriangle<double> Panels(const textbook::Matrix& h) {
  UpperTriangle<double> panels(h.rows);
  for (int64_t i = 0; i < h.rows; ++i) {
    for (int64_t j = i; j < h.rows; ++j) panels.at(i, j) = h(i, j);
  }
  return panels;
}

FactorAttempt MustFactor(const textbook::Matrix& h, double lambda, Executor* executor = nullptr) {
  SerialExecutor serial;
  RunContext context;
  context.executor = executor == nullptr ? &serial : executor;
  auto attempt = FactorDamped(Panels(h), std::vector<bool>(static_cast<size_t>(h.rows)), lambda,
                              FactorUse::kCertify, context);
  EXPECT_TRUE(attempt.ok());
  return *std::move(attempt);
}

// Backward error of Cholesky (Higham, Thm 10.3): |U D U^T - H| <= gamma_{n+1} |U| D |U|^T, and
// the right side is at most gamma_{n+1} sqrt(H_ii H_jj).
void ExpectReconstructs(const textbook::Matrix& h, double lambda, const Factor& f) {
  const int64_t n = h.rows;
  const auto u = [&](int64_t i, int64_t j) { return i == j ? 1.0 : f.u.at(i, j); };
  for (int64_t i = 0; i < n; ++i) {
    for (int64_t j = i; j < n; ++j) {
      double sum = 0;
      for (int64_t l = j; l < n; ++l) sum += u(i, l) * f.d[l] * u(j, l);
      const double truth = h(i, j) + (i == j ? lambda : 0);
      const double size = std::sqrt((h(i, i) + lambda) * (h(j, j) + lambda));
      ASSERT_NEAR(sum, truth, 4.0 * (static_cast<double>(n) + 2) * 0x1p-53 * size)
          << "entry " << i << ", " << j << " of " << n;
    }
  }
}

TEST(FactorTest, ReconstructsAtEverySize) {
  for (const int64_t n : {1, 2, 3, 4, 5, 6, 7, 8, 9, 63, 64, 65, 127, 128, 129, 255, 257, 300}) {
    const textbook::Matrix h =
        textbook::Gram(MakeLayer(2 * n, n, 1, Inputs::kCorrelated, 17 + n).x);
    const double lambda = 0.01 * h(0, 0);
    const FactorAttempt attempt = MustFactor(h, lambda);
    ASSERT_EQ(attempt.cause, StabilityCause::kNone) << attempt.detail;
    ExpectReconstructs(h, lambda, attempt.factor);
  }
}

TEST(FactorTest, ReconstructsIllConditionedAndSingularGramsOnceDamped) {
  for (const Inputs inputs : {Inputs::kIllConditioned, Inputs::kRankDeficient}) {
    const textbook::Matrix h = textbook::Gram(MakeLayer(60, 140, 1, inputs, 23).x);
    double trace = 0;
    for (int64_t i = 0; i < h.rows; ++i) trace += h(i, i);
    const double lambda = 1e-6 * trace / 140;
    const FactorAttempt attempt = MustFactor(h, lambda);
    ASSERT_EQ(attempt.cause, StabilityCause::kNone) << attempt.detail;
    ExpectReconstructs(h, lambda, attempt.factor);
  }
}

// (M1): D_j is the squared distance of column j of the augmented activations
// from the span of those after it; the last one is its whole squared norm.
TEST(FactorTest, LastPivotIsTheColumnsNormAndPivotsMultiplyToTheDeterminant) {
  textbook::Matrix h(2, 2);
  h(0, 0) = 5;
  h(0, 1) = h(1, 0) = 2;
  h(1, 1) = 3;
  const Factor f = MustFactor(h, 0.5).factor;
  EXPECT_DOUBLE_EQ(f.d[1], 3.5);
  EXPECT_DOUBLE_EQ(f.d[0] * f.d[1], 5.5 * 3.5 - 4);
  EXPECT_DOUBLE_EQ(f.u.at(0, 1), 2 / 3.5);
}

TEST(FactorTest, TrailingBlockOfTheFactorIsTheFactorOfTheTrailingBlock) {
  const textbook::Matrix h = textbook::Gram(MakeLayer(300, 150, 1, Inputs::kGaussian, 29).x);
  textbook::Matrix tail(149, 149);
  for (int64_t i = 0; i < 149; ++i) {
    for (int64_t j = 0; j < 149; ++j) tail(i, j) = h(i + 1, j + 1);
  }
  const Factor whole = MustFactor(h, 1).factor;
  const Factor part = MustFactor(tail, 1).factor;
  for (int64_t i = 0; i < 149; ++i) {
    EXPECT_NEAR(part.d[i], whole.d[i + 1], 1e-12 * part.d[i]);
  }
}

TEST(FactorTest, DoesNotDependOnThreads) {
  const textbook::Matrix h = textbook::Gram(MakeLayer(500, 400, 1, Inputs::kCorrelated, 31).x);
  testing::ContraryExecutor contrary;
  const Factor serial = MustFactor(h, 2).factor;
  const Factor threaded = MustFactor(h, 2, &contrary).factor;
  EXPECT_EQ(serial.d, threaded.d);
  for (int64_t i = 0; i < 400; ++i) {
    for (int64_t j = i + 1; j < 400; ++j) ASSERT_EQ(serial.u.at(i, j), threaded.u.at(i, j));
  }
}

TEST(FactorTest, SolvesWithASmallResidual) {
  const textbook::Matrix h = textbook::Gram(MakeLayer(400, 130, 1, Inputs::kCorrelated, 37).x);
  const Factor f = MustFactor(h, 1).factor;
  std::vector<double> b(130);
  for (size_t i = 0; i < b.size(); ++i) b[i] = std::sin(static_cast<double>(i));
  std::vector<double> x = b;
  engine::SerialExecutor executor;
  SolveInPlace(f, x, executor);
  double norm_h = 0;
  double norm_x = 0;
  double residual = 0;
  for (int64_t i = 0; i < 130; ++i) {
    double sum = x[i];
    double row = 1;
    for (int64_t j = 0; j < 130; ++j) {
      sum += h(i, j) * x[j];
      row += std::abs(h(i, j));
    }
    residual = std::max(residual, std::abs(sum - b[i]));
    norm_h = std::max(norm_h, row);
    norm_x = std::max(norm_x, std::abs(x[i]));
  }
  EXPECT_LE(residual, 4 * 130 * 0x1p-53 * 130 * norm_h * norm_x);
}

TEST(FactorTest, ConditionEstimateIsALowerBoundWithinAFactorOfThree) {
  for (const double smallest : {1e-2, 1e-5, 1e-8}) {
    // Diagonal up to a rotation-free mixing: H = L L^T with known inverse.
    const int64_t n = 40;
    textbook::Matrix h(n, n);
    for (int64_t i = 0; i < n; ++i) {
      h(i, i) = std::pow(smallest, static_cast<double>(i) / static_cast<double>(n - 1));
    }
    const FactorAttempt attempt = MustFactor(h, 0);
    ASSERT_EQ(attempt.cause, StabilityCause::kNone);
    EXPECT_LE(attempt.factor.condition, 1 / smallest * (1 + 1e-12));
    EXPECT_GE(attempt.factor.condition, 1 / smallest / 3);
  }
}

TEST(FactorTest, NamesEachStabilityFailure) {
  textbook::Matrix negative(3, 3);
  negative(0, 0) = 1;
  negative(1, 1) = -1;
  negative(2, 2) = 1;
  const FactorAttempt pivot = MustFactor(negative, 0);
  EXPECT_EQ(pivot.cause, StabilityCause::kPivot);
  EXPECT_NE(pivot.detail.find("feature 1"), std::string::npos) << pivot.detail;

  textbook::Matrix infinite(2, 2);
  infinite(0, 0) = 1;
  infinite(1, 1) = INFINITY;
  EXPECT_EQ(MustFactor(infinite, 0).cause, StabilityCause::kNonFinite);

  textbook::Matrix spread(2, 2);
  spread(0, 0) = 1;
  spread(1, 1) = 1e-17;
  EXPECT_EQ(MustFactor(spread, 0).cause, StabilityCause::kCondition);
  EXPECT_EQ(MustFactor(spread, 1e-3).cause, StabilityCause::kNone);
}

// The pivot of one of two equal features is what rounding leaves, at most 2 (N + 2) u H_ii by the
// backward error: 1 / d alone is past the limit. The estimate's own vectors may have no part in
// their difference.
TEST(FactorTest, RefusesEqualFeaturesHoweverTheirPivotIsRounded) {
  for (uint64_t seed = 61; seed < 81; ++seed) {
    for (const auto& [n, twin] : {std::pair<int64_t, int64_t>{48, 1}, {48, 47}, {200, 150}}) {
      textbook::Matrix x = MakeLayer(2 * n, n, 1, Inputs::kGaussian, seed).x;
      for (int64_t t = 0; t < x.rows; ++t) x(t, twin) = x(t, 0);
      const textbook::Matrix h = textbook::Gram(x);
      const FactorAttempt attempt = MustFactor(h, 1e-18 * h(0, 0));
      EXPECT_TRUE(attempt.cause == StabilityCause::kPivot ||
                  attempt.cause == StabilityCause::kCondition)
          << n << " features, seed " << seed << ", condition " << attempt.factor.condition;
    }
  }
}

TEST(FactorTest, LeavesDeadFeaturesOut) {
  textbook::Matrix h(3, 3);
  h(0, 0) = 2;
  h(0, 2) = h(2, 0) = 1;
  h(2, 2) = 2;
  SerialExecutor serial;
  RunContext context;
  context.executor = &serial;
  const auto attempt =
      FactorDamped(Panels(h), {false, true, false}, 0, FactorUse::kCertify, context);
  ASSERT_TRUE(attempt.ok());
  ASSERT_EQ(attempt->cause, StabilityCause::kNone) << attempt->detail;
  EXPECT_EQ(attempt->factor.u.at(0, 1), 0);
  EXPECT_EQ(attempt->factor.u.at(1, 2), 0);
  EXPECT_DOUBLE_EQ(attempt->factor.u.at(0, 2), 0.5);
}

TEST(FactorTest, StopsWhenCancelled) {
  Cancellation cancellation;
  cancellation.Cancel(absl::StatusCode::kCancelled);
  SerialExecutor serial;
  RunContext context;
  context.executor = &serial;
  context.cancellation = &cancellation;
  textbook::Matrix h(1, 1);
  h(0, 0) = 1;
  EXPECT_EQ(FactorDamped(Panels(h), {false}, 0, FactorUse::kCertify, context).status().code(),
            absl::StatusCode::kCancelled);
}

// A factor for judging may leave the estimate out only where the estimate could not refuse, and is
// float32 only where lambda drowns what that does to H: U and D are those of H + E, |E_ij| of the
// order of sqrt(N) u sqrt(H_ii H_jj), u = 2^-24. By D_j >= lambda, D_j is off by at most N times
// |E| / lambda of itself.
TEST(FactorTest, JudgesAsItCertifies) {
  SerialExecutor serial;
  RunContext context;
  context.executor = &serial;
  constexpr int64_t kFeatures = 200;
  const textbook::Matrix h =
      textbook::Gram(MakeLayer(300, kFeatures, 1, Inputs::kRankDeficient, 5).x);
  const UpperTriangle<double> gram = Panels(h);
  double largest = 0;
  for (int64_t j = 0; j < kFeatures; ++j) largest = std::max(largest, h(j, j));
  const std::vector<bool> dead(kFeatures);
  int left_out = 0;
  int refused = 0;
  int single = 0;
  for (const double share : {1e-18, 1e-15, 1e-14, 1e-11, 1e-4, 1e-3, 0.1}) {
    const double lambda = share * largest;
    const auto full = FactorDamped(gram, dead, lambda, FactorUse::kCertify, context);
    const auto judged = FactorDamped(gram, dead, lambda, FactorUse::kJudge, context);
    ASSERT_TRUE(full.ok() && judged.ok());
    EXPECT_EQ(judged->cause, full->cause) << share;
    if (full->cause != StabilityCause::kNone) {
      ++refused;
      continue;
    }
    EXPECT_GT(full->factor.condition, 1);
    if (judged->factor.condition == 0) ++left_out;
    if (judged->factor.d == full->factor.d) continue;
    ++single;
    ASSERT_GE(share, 1e-5);
    EXPECT_EQ(judged->factor.narrow.size(), kFeatures);
    UpperTriangle<double> room;
    const UpperTriangle<double>& u = WideU(judged->factor, room, *context.executor);
    const double n = kFeatures;
    const double tolerance = std::sqrt(n) * 0x1p-24 * (largest / lambda + 1) * std::sqrt(n);
    for (int64_t j = 0; j < kFeatures; ++j) {
      const auto at = static_cast<size_t>(j);
      EXPECT_NEAR(judged->factor.d[at], full->factor.d[at], tolerance * full->factor.d[at]);
      for (int64_t i = 0; i < j; ++i) {
        EXPECT_NEAR(u.at(i, j), full->factor.u.at(i, j),
                    tolerance * std::sqrt(h(i, i) / full->factor.d[at]));
      }
    }
  }
  EXPECT_GT(left_out, 0);
  EXPECT_GT(refused, 0);
  EXPECT_EQ(single, 3);
}

// Sums beyond float32's range are scaled first.
TEST(FactorTest, JudgesHugeAndTinySums) {
  SerialExecutor serial;
  RunContext context;
  context.executor = &serial;
  const textbook::Matrix h = textbook::Gram(MakeLayer(60, 40, 1, Inputs::kGaussian, 5).x);
  const std::vector<bool> dead(40);
  const auto plain = FactorDamped(Panels(h), dead, 8.0, FactorUse::kJudge, context);
  ASSERT_TRUE(plain.ok());
  for (const int exponent : {-200, 300}) {
    textbook::Matrix scaled = h;
    for (double& value : scaled.values) value = std::ldexp(value, exponent);
    const auto judged =
        FactorDamped(Panels(scaled), dead, std::ldexp(8.0, exponent), FactorUse::kJudge, context);
    ASSERT_TRUE(judged.ok());
    ASSERT_EQ(judged->cause, StabilityCause::kNone);
    for (size_t j = 0; j < 40; ++j) {
      EXPECT_EQ(judged->factor.d[j], std::ldexp(plain->factor.d[j], exponent));
    }
  }
}

}  // namespace
}  // namespace certiq::engine
