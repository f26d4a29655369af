// Each cause of a damping failure by itself, end to end; how it travels in a status; and what is
// refused before any factorisation.

#include <gtest/gtest.h>

#include <cmath>
#include <functional>
#include <limits>
#include <string>

#include "base/status.h"
#include "engine/linalg/failed_attempts.h"
#include "tests/engine/problems.h"
#include "tests/engine/specs.h"

namespace certiq::engine {
namespace {

using testing::Inputs;
using testing::MakeLayer;
using Causes = std::vector<StabilityCause>;

TEST(FailedAttemptsTest, TravelWithAStatus) {
  absl::Status status = base::PreconditionError("DAMPING", "spec.damping", "three attempts");
  EXPECT_EQ(FailedAttemptsOf(status), Causes());
  const Causes causes{StabilityCause::kPivot, StabilityCause::kPivot, StabilityCause::kNonFinite,
                      StabilityCause::kCondition};
  AttachFailedAttempts(causes, status);
  EXPECT_EQ(FailedAttemptsOf(status), causes);
  EXPECT_EQ(base::PreconditionOf(status)->type, "DAMPING") << "other payloads stay";
  AttachFailedAttempts({StabilityCause::kPivot}, status);
  EXPECT_EQ(FailedAttemptsOf(status), Causes{StabilityCause::kPivot});
}

TEST(FailedAttemptsTest, NothingIsAttachedForNone) {
  absl::Status status = absl::InternalError("x");
  AttachFailedAttempts({}, status);
  EXPECT_EQ(status, absl::InternalError("x"));
  EXPECT_EQ(FailedAttemptsOf(absl::OkStatus()), Causes());
}

// Sums as a caller may hand them in, e.g. merged from elsewhere.
class CauseTest : public ::testing::TestWithParam<Method> {
 protected:
  static constexpr int64_t kFeatures = 40;

  static Statistics Diagonal(const std::function<double(int64_t)>& entry) {
    Statistics sums;
    sums.tokens = 100;
    sums.gram = UpperTriangle<double>(kFeatures);
    for (int64_t j = 0; j < kFeatures; ++j) sums.gram.at(j, j) = entry(j);
    return sums;
  }

  absl::StatusOr<QuantizedLayer> Run(Statistics sums, ResolvedSpec spec) {
    spec.method = GetParam();
    SerialExecutor executor;
    RunContext context;
    context.executor = &executor;
    auto weights = MakeLayer(1, kFeatures, 3, Inputs::kGaussian, 613).w;
    // No form that is certified meets the diagonal that tests spoil: sums that no tokens have are
    // refused where they show (extreme_sums_test.cc).
    for (int64_t r = 0; r < weights.rows; ++r) weights(r, 17) = 0;
    return QuantizeLayer({testing::Completed(spec), testing::Strips(weights),
                          std::make_shared<const Statistics>(std::move(sums))},
                         context);
  }

  CauseTest() { spec_.damping_rule = DampingRule::kAbsolute; }

  ResolvedSpec spec_;
};

TEST_P(CauseTest, Pivot) {
  spec_.damping_value = 0.5;
  spec_.max_attempts = 3;
  const auto indefinite = [](int64_t j) { return j == 17 ? -100.0 : 1.0; };
  const auto layer = Run(Diagonal(indefinite), spec_);
  EXPECT_EQ(layer.status().code(), absl::StatusCode::kFailedPrecondition);
  // -100 + 0.5, + 5, + 50.
  EXPECT_EQ(FailedAttemptsOf(layer.status()), Causes(3, StabilityCause::kPivot));
  EXPECT_NE(layer.status().message().find("lambda 50: pivot -50 at feature 17"),
            absl::string_view::npos)
      << layer.status();

  spec_.max_attempts = 4;
  const auto found = Run(Diagonal(indefinite), spec_);
  ASSERT_TRUE(found.ok()) << found.status();
  EXPECT_EQ(found->certificate.lambda_used, 500);
  EXPECT_EQ(found->certificate.damping_attempts.size(), 4u);
}

TEST_P(CauseTest, Condition) {
  spec_.damping_value = 0;
  spec_.max_attempts = 1;
  const auto spread = [](int64_t j) { return std::exp2(-2 * static_cast<double>(j)); };
  const auto layer = Run(Diagonal(spread), spec_);
  EXPECT_EQ(FailedAttemptsOf(layer.status()), Causes{StabilityCause::kCondition});
  EXPECT_NE(layer.status().message().find("condition estimate"), absl::string_view::npos);

  spec_.max_attempts = 2;
  const auto found = Run(Diagonal(spread), spec_);
  ASSERT_TRUE(found.ok()) << found.status();
  EXPECT_EQ(found->certificate.damping_attempts[0].cause, StabilityCause::kCondition);
}

TEST_P(CauseTest, NonFinite) {
  for (const double bad : {std::numeric_limits<double>::infinity(), std::nan("")}) {
    const auto broken = [&](int64_t j) { return j == 17 ? bad : 1.0; };
    spec_.damping_value = 0.5;
    spec_.max_attempts = 2;
    spec_.on_failure = OnFailure::kFail;
    const auto layer = Run(Diagonal(broken), spec_);
    EXPECT_EQ(FailedAttemptsOf(layer.status()), Causes(2, StabilityCause::kNonFinite))
        << layer.status();
    // Plain rounding has no true error to certify either.
    spec_.on_failure = OnFailure::kNearest;
    EXPECT_FALSE(Run(Diagonal(broken), spec_).ok());
    // lambda cannot be taken from such sums.
    ResolvedSpec relative;
    relative.damping_rule = DampingRule::kRelativeTrace;
    const auto none = Run(Diagonal(broken), relative);
    EXPECT_EQ(none.status().code(), absl::StatusCode::kInvalidArgument);
    EXPECT_EQ(base::FieldOf(none.status()), "spec.damping.relative_trace");
  }
}

TEST_P(CauseTest, LadderEndsBeforeLambdaLeavesFloat64) {
  spec_.damping_value = 1e-3;
  spec_.damping_factor = 1e300;
  spec_.max_attempts = 20;
  const auto indefinite = [](int64_t j) { return j == 17 ? -std::ldexp(1.0, 1020) : 1.0; };
  const auto layer = Run(Diagonal(indefinite), spec_);
  EXPECT_EQ(FailedAttemptsOf(layer.status()), Causes(2, StabilityCause::kPivot)) << layer.status();
  EXPECT_EQ(layer.status().message().find("inf"), absl::string_view::npos) << layer.status();
}

INSTANTIATE_TEST_SUITE_P(Methods, CauseTest, ::testing::Values(Method::kOptq, Method::kQronos),
                         [](const auto& test) {
                           return test.param == Method::kOptq ? "Optq" : "Qronos";
                         });

TEST(DampingTest, RefusesALambdaBeyondFloat64) {
  auto layer = MakeLayer(60, 8, 2, Inputs::kGaussian, 617);
  for (double& v : layer.x.values) v = static_cast<float>(1e30 * v);
  ResolvedSpec spec;
  spec.damping_value = 1e300;
  const auto result = testing::Quantize(layer, spec);
  EXPECT_EQ(result.status().code(), absl::StatusCode::kInvalidArgument);
  EXPECT_EQ(base::FieldOf(result.status()), "spec.damping.relative_trace");
}

TEST(DampingTest, EveryStepOfALadderIsCountedWhereAllFail) {
  auto layer = MakeLayer(20, 60, 2, Inputs::kGaussian, 619);
  layer.held_x = MakeLayer(20, 60, 1, Inputs::kGaussian, 631).x;
  ResolvedSpec spec;
  spec.damping_rule = DampingRule::kHeldOut;
  spec.damping_candidates = {1e-30, 1e-29, 1e-28};
  spec.max_attempts = 2;
  const auto result = testing::Quantize(layer, spec);
  EXPECT_EQ(base::PreconditionOf(result.status())->type, "DAMPING");
  EXPECT_EQ(FailedAttemptsOf(result.status()).size(), 6u);
}

// A dead feature takes no part, so it is no reason to raise lambda, however small that is.
TEST(DampingTest, DeadFeaturesDoNotSpoilATinyLambda) {
  auto layer = MakeLayer(200, 30, 4, Inputs::kGaussian, 641);
  for (int64_t t = 0; t < 200; ++t) layer.x(t, 0) = layer.x(t, 11) = 0;
  for (const Method method : {Method::kOptq, Method::kQronos}) {
    layer.x_quantized = textbook::Matrix();
    if (method == Method::kQronos) {
      layer.x_quantized = layer.x;
      for (double& v : layer.x_quantized.values) v = static_cast<float>(1.05 * v);
    }
    for (const double lambda : {0.0, 1e-320, 1e-30, 1e-14}) {
      ResolvedSpec spec;
      spec.method = method;
      spec.damping_rule = DampingRule::kAbsolute;
      spec.damping_value = lambda;
      const auto result = testing::Quantize(layer, spec);
      ASSERT_TRUE(result.ok()) << result.status();
      EXPECT_EQ(result->certificate.damping_attempts.size(), 1u) << lambda;
      EXPECT_EQ(result->certificate.lambda_used, lambda);
      EXPECT_EQ(result->certificate.dead_features, 2);
    }
  }
}

// Where float32 cannot hold an input, it is named and refused.
TEST(InputTest, RefusesWhatFloat32CannotHold) {
  SerialExecutor executor;
  const std::vector<double> wide{1, 2, 3, 4, -1e39, 6};
  StatisticsAccumulator sums(3);
  const absl::Status beyond = sums.Append(
      {DType::kF64, reinterpret_cast<const std::byte*>(wide.data()), "x"}, 0, 2, executor);
  EXPECT_EQ(beyond.code(), absl::StatusCode::kInvalidArgument);
  EXPECT_EQ(base::FieldOf(beyond), "x");
  EXPECT_NE(beyond.message().find("row 1, column 1"), absl::string_view::npos) << beyond;

  // Each fits, their difference does not.
  const std::vector<float> x{3e38f};
  const std::vector<float> x_quantized{-3e38f};
  StatisticsAccumulator pair(1, true);
  const absl::Status apart = pair.AppendPair(
      {DType::kF32, reinterpret_cast<const std::byte*>(x.data()), "x"},
      {DType::kF32, reinterpret_cast<const std::byte*>(x_quantized.data()), "x_quantized"}, 0, 1,
      executor);
  EXPECT_EQ(apart.code(), absl::StatusCode::kInvalidArgument);
  EXPECT_EQ(base::FieldOf(apart), "x");
}

// float16 subnormals arrive as what they are.
TEST(InputTest, Float16SubnormalsCount) {
  SerialExecutor executor;
  const std::vector<uint16_t> bits{0x0001, 0x8003, 0x03ff, 0x0000};
  StatisticsAccumulator sums(2);
  ASSERT_TRUE(sums.Append({DType::kF16, reinterpret_cast<const std::byte*>(bits.data()), "x"}, 0, 2,
                          executor)
                  .ok());
  const Statistics found = std::move(sums).Finish(executor);
  EXPECT_EQ(found.gram.at(0, 0), (1 + 1023.0 * 1023) * 0x1p-48);
  EXPECT_EQ(found.gram.at(0, 1), -3 * 0x1p-48);
  EXPECT_EQ(found.gram.at(1, 1), 9 * 0x1p-48);
}

}  // namespace
}  // namespace certiq::engine
