#include "engine/quantize_layer.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <utility>

#include "base/status.h"
#include "tests/engine/problems.h"

namespace certiq::engine {
namespace {

using testing::Inputs;
using testing::MakeLayer;

TEST(QuantizeLayerTest, IsBitIdenticalWhateverTheExecutor) {
  const auto problem = MakeLayer(400, 300, 150, Inputs::kCorrelated, 83);
  ResolvedSpec spec;
  spec.group_size = 64;
  spec.symmetric = false;
  spec.compare_nearest = true;
  testing::ContraryExecutor contrary;
  const auto a = testing::Quantize(problem, spec);
  const auto b = testing::Quantize(problem, spec, &contrary);
  ASSERT_TRUE(a.ok() && b.ok());
  ASSERT_EQ(a->tensors.size(), b->tensors.size());
  for (size_t t = 0; t < a->tensors.size(); ++t) {
    EXPECT_EQ(a->tensors[t].bytes, b->tensors[t].bytes) << a->tensors[t].role;
  }
  EXPECT_EQ(a->certificate.row_error, b->certificate.row_error);
  EXPECT_EQ(a->certificate.row_bound, b->certificate.row_bound);
  EXPECT_EQ(a->certificate.squared_error, b->certificate.squared_error);
  EXPECT_EQ(a->certificate.nearest_relative_error, b->certificate.nearest_relative_error);
}

TEST(QuantizeLayerTest, ReturnsDenseWeightsOnTheirGrid) {
  const auto problem = MakeLayer(100, 50, 7, Inputs::kGaussian, 89);
  ResolvedSpec spec;
  spec.symmetric = false;
  spec.group_size = 16;
  spec.bits = 3;
  const auto layer = testing::Quantize(problem, spec);
  ASSERT_TRUE(layer.ok());
  const auto weight = testing::TensorValues(*layer, "weight");
  const auto scales = testing::TensorValues(*layer, "scales");
  const auto zeros = testing::TensorValues(*layer, "zeros");
  const auto groups = testing::TensorValues(*layer, "g_idx");
  ASSERT_EQ(weight.size(), 350u);
  ASSERT_EQ(scales.size(), 28u);
  ASSERT_EQ(zeros.size(), 28u);
  ASSERT_EQ(groups.size(), 50u);
  for (size_t r = 0; r < 7; ++r) {
    for (size_t j = 0; j < 50; ++j) {
      const size_t group = j / 16;
      ASSERT_EQ(groups[j], static_cast<double>(group));
      const size_t g = r * 4 + group;
      const double code = std::round(weight[r * 50 + j] / scales[g] + zeros[g]);
      EXPECT_GE(code, 0);
      EXPECT_LE(code, 7);
      EXPECT_EQ(weight[r * 50 + j], static_cast<double>(static_cast<float>(scales[g]) *
                                                        static_cast<float>(code - zeros[g])));
    }
  }
  EXPECT_NEAR(layer->certificate.bits_per_weight, 3 + 4.0 * (32 + 3) / 50, 1e-12);
}

TEST(QuantizeLayerTest, GivesDeadFeaturesZeroWeightsAndNoVoice) {
  auto problem = MakeLayer(100, 40, 6, Inputs::kGaussian, 97);
  for (int64_t t = 0; t < 100; ++t) problem.x(t, 3) = problem.x(t, 39) = 0;
  // They would set the scale, were they heard.
  for (int64_t r = 0; r < 6; ++r) problem.w(r, 3) = 100;
  for (const double damping : {0.01, 0.0}) {
    ResolvedSpec spec;
    spec.damping_value = damping;
    const auto layer = testing::Quantize(problem, spec);
    ASSERT_TRUE(layer.ok()) << layer.status();
    EXPECT_EQ(layer->certificate.dead_features, 2);
    const auto weight = testing::TensorValues(*layer, "weight");
    for (size_t r = 0; r < 6; ++r) {
      EXPECT_EQ(weight[r * 40 + 3], 0);
      EXPECT_EQ(weight[r * 40 + 39], 0);
    }
    EXPECT_LT(layer->certificate.relative_error, 0.2);
  }
}

TEST(QuantizeLayerTest, RaisesLambdaAndReportsWhy) {
  const auto problem = MakeLayer(20, 60, 4, Inputs::kGaussian, 101);
  ResolvedSpec spec;
  spec.damping_rule = DampingRule::kAbsolute;
  spec.damping_value = 0;
  spec.max_attempts = 20;
  const auto layer = testing::Quantize(problem, spec);
  ASSERT_TRUE(layer.ok()) << layer.status();
  const LayerCertificate& c = layer->certificate;
  EXPECT_EQ(c.lambda_requested, 0);
  EXPECT_GT(c.lambda_used, 0);
  ASSERT_GT(c.damping_attempts.size(), 1u);
  EXPECT_EQ(c.damping_attempts.front().lambda, 0);
  EXPECT_NE(c.damping_attempts.front().cause, StabilityCause::kNone);
  EXPECT_EQ(c.damping_attempts.back().cause, StabilityCause::kNone);
  EXPECT_EQ(c.damping_attempts.back().lambda, c.lambda_used);
}

TEST(QuantizeLayerTest, FailsWithTheNumbersWhenEveryAttemptFailed) {
  const auto problem = MakeLayer(20, 60, 4, Inputs::kGaussian, 101);
  ResolvedSpec spec;
  spec.damping_value = 0;
  spec.max_attempts = 2;
  const auto layer = testing::Quantize(problem, spec);
  ASSERT_EQ(layer.status().code(), absl::StatusCode::kFailedPrecondition);
  ASSERT_TRUE(base::PreconditionOf(layer.status()).has_value());
  EXPECT_EQ(base::PreconditionOf(layer.status())->type, "DAMPING");
  EXPECT_NE(layer.status().message().find("lambda 0"), absl::string_view::npos) << layer.status();
}

TEST(QuantizeLayerTest, RefusesActivationsThatAreAllZero) {
  auto problem = MakeLayer(5, 4, 2, Inputs::kGaussian, 103);
  for (double& v : problem.x.values) v = 0;
  EXPECT_EQ(testing::Quantize(problem, {}).status().code(), absl::StatusCode::kFailedPrecondition);
}

TEST(QuantizeLayerTest, ZeroWeightsAreExact) {
  auto problem = MakeLayer(50, 20, 3, Inputs::kGaussian, 107);
  for (double& v : problem.w.values) v = 0;
  ResolvedSpec spec;
  spec.compare_nearest = true;
  const auto layer = testing::Quantize(problem, spec);
  ASSERT_TRUE(layer.ok()) << layer.status();
  EXPECT_EQ(layer->certificate.relative_error, 0);
  EXPECT_EQ(layer->certificate.nearest_relative_error, 0);
  EXPECT_EQ(layer->certificate.identity_residual, 0);
  for (const double v : testing::TensorValues(*layer, "weight")) EXPECT_EQ(v, 0);
}

// Scaling inputs or weights by powers of two changes no code, as long as
// float32 holds the weights.
TEST(QuantizeLayerTest, IsEquivariantUnderTinyAndHugeScales) {
  const auto problem = MakeLayer(150, 70, 9, Inputs::kCorrelated, 109);
  const auto reference = testing::Quantize(problem, {});
  ASSERT_TRUE(reference.ok());
  const auto weight = testing::TensorValues(*reference, "weight");
  for (const double x_scale : {0x1p-100, 0x1p100}) {
    for (const double w_scale : {0x1p-90, 0x1p90}) {
      auto scaled = problem;
      for (double& v : scaled.x.values) v *= x_scale;
      for (double& v : scaled.w.values) v *= w_scale;
      const auto layer = testing::Quantize(scaled, {});
      ASSERT_TRUE(layer.ok()) << layer.status();
      const auto got = testing::TensorValues(*layer, "weight");
      for (size_t i = 0; i < got.size(); ++i) ASSERT_EQ(got[i], weight[i] * w_scale);
      EXPECT_NEAR(layer->certificate.relative_error, reference->certificate.relative_error,
                  1e-6 * reference->certificate.relative_error);
    }
  }
}

TEST(QuantizeLayerTest, NothingThatIsNotFiniteLeavesTheEngine) {
  auto problem = MakeLayer(150, 70, 2, Inputs::kCorrelated, 113);
  for (double& v : problem.w.values) v = v > 0 ? 3e38 : -3e38;
  const auto layer = testing::Quantize(problem, {});
  if (layer.ok()) {
    for (const double v : testing::TensorValues(*layer, "weight")) EXPECT_TRUE(std::isfinite(v));
    EXPECT_TRUE(std::isfinite(layer->certificate.squared_error));
  } else {
    EXPECT_EQ(layer.status().code(), absl::StatusCode::kInvalidArgument);
    EXPECT_EQ(base::FieldOf(layer.status()), "weight");
  }
}

TEST(QuantizeLayerTest, RefusesSizesThatDoNotFit) {
  SerialExecutor serial;
  RunContext context;
  context.executor = &serial;
  const auto a = MakeLayer(10, 4, 2, Inputs::kGaussian, 127);
  const auto b = MakeLayer(10, 5, 2, Inputs::kGaussian, 127);
  LayerProblem problem{ResolvedSpec(), testing::Strips(a.w),
                       std::make_shared<const Statistics>(testing::Accumulate(b.x))};
  const auto layer = QuantizeLayer(std::move(problem), context);
  EXPECT_EQ(layer.status().code(), absl::StatusCode::kInvalidArgument);
  EXPECT_EQ(base::FieldOf(layer.status()), "x.shape");
}

// Cancelled at every phase in turn, it stops with the reason.
TEST(QuantizeLayerTest, StopsInEveryPhaseWhenCancelled) {
  const auto data = MakeLayer(300, 200, 80, Inputs::kGaussian, 131);
  for (const Phase phase : {Phase::kFactor, Phase::kReference, Phase::kRound, Phase::kCertify}) {
    SerialExecutor serial;
    Cancellation cancellation;
    RunContext context;
    context.executor = &serial;
    context.cancellation = &cancellation;
    context.progress = [&](Phase at, double) {
      if (at == phase) cancellation.Cancel(absl::StatusCode::kDeadlineExceeded);
    };
    LayerProblem problem{ResolvedSpec(), testing::Strips(data.w),
                         std::make_shared<const Statistics>(testing::Accumulate(data.x))};
    const auto layer = QuantizeLayer(std::move(problem), context);
    EXPECT_EQ(layer.status().code(), absl::StatusCode::kDeadlineExceeded)
        << static_cast<int>(phase);
  }
}

TEST(QuantizeLayerTest, ReportsEveryPhaseInOrder) {
  const auto data = MakeLayer(300, 200, 80, Inputs::kGaussian, 137);
  SerialExecutor serial;
  RunContext context;
  context.executor = &serial;
  std::vector<Phase> seen;
  context.progress = [&](Phase at, double fraction) {
    EXPECT_GE(fraction, 0);
    EXPECT_LE(fraction, 1);
    if (seen.empty() || seen.back() != at) seen.push_back(at);
  };
  LayerProblem problem{ResolvedSpec(), testing::Strips(data.w),
                       std::make_shared<const Statistics>(testing::Accumulate(data.x))};
  ASSERT_TRUE(QuantizeLayer(std::move(problem), context).ok());
  EXPECT_EQ(seen, (std::vector<Phase>{Phase::kReference, Phase::kFactor, Phase::kRound,
                                      Phase::kCertify, Phase::kPack}));
}

// Every seventh row of a layer's weights.
testing::RandomLayer SomeRows(const testing::RandomLayer& layer, std::vector<int64_t>& rows) {
  testing::RandomLayer some = layer;
  rows.clear();
  for (int64_t r = 0; r < layer.w.rows; r += 7) rows.push_back(r);
  some.w = textbook::Matrix(static_cast<int64_t>(rows.size()), layer.w.cols);
  for (size_t i = 0; i < rows.size(); ++i) {
    for (int64_t j = 0; j < layer.w.cols; ++j) {
      some.w(static_cast<int64_t>(i), j) = layer.w(rows[i], j);
    }
  }
  return some;
}

// Tiles, strips and lanes are nobody's business: a row comes out the same whatever rows are
// beside it.
TEST(QuantizeLayerTest, ARowDoesNotDependOnItsNeighbours) {
  // Enough rows for tiles of several strips.
  testing::RandomLayer layer = MakeLayer(400, 150, 1300, Inputs::kCorrelated, 17);
  layer.x_quantized = testing::Disturbed(layer.x, 0.1, 18);
  for (const Method method : {Method::kOptq, Method::kQronos}) {
    ResolvedSpec spec;
    spec.method = method;
    spec.order = Order::kDecreasingNorm;
    spec.group_size = 32;
    spec.damping_rule = DampingRule::kRelativeTrace;
    spec.damping_value = 0.02;
    std::vector<int64_t> rows;
    const auto all = testing::Quantize(layer, spec);
    const auto some = testing::Quantize(SomeRows(layer, rows), spec);
    ASSERT_TRUE(all.ok() && some.ok()) << all.status() << some.status();
    const std::vector<double> weight = testing::TensorValues(*all, "weight");
    const std::vector<double> part = testing::TensorValues(*some, "weight");
    for (size_t i = 0; i < rows.size(); ++i) {
      const auto r = static_cast<size_t>(rows[i]);
      for (size_t j = 0; j < 150; ++j) {
        ASSERT_EQ(part[i * 150 + j], weight[r * 150 + j]) << "row " << r << ", column " << j;
      }
      ASSERT_EQ(some->certificate.row_error[i], all->certificate.row_error[r]) << r;
      ASSERT_EQ(some->certificate.row_bound[i], all->certificate.row_bound[r]) << r;
    }
  }
}

// A ladder runs on a sample of rows: each of its errors is that of a job with just these rows and
// that lambda.
TEST(QuantizeLayerTest, LaddersAreRunOnASampleOfRows) {
  testing::RandomLayer layer = MakeLayer(300, 60, 700, Inputs::kCorrelated, 23);
  layer.held_x = MakeLayer(80, 60, 1, Inputs::kCorrelated, 24).x;
  ResolvedSpec spec;
  spec.damping_rule = DampingRule::kHeldOut;
  spec.damping_candidates = {0.001, 0.1};
  const auto ladder = testing::Quantize(layer, spec);
  ASSERT_TRUE(ladder.ok()) << ladder.status();
  EXPECT_EQ(ladder->certificate.held_out_rows, 87);
  ASSERT_EQ(ladder->certificate.damping_candidates.size(), 2u);

  testing::RandomLayer sample = layer;
  sample.w = textbook::Matrix(87, 60);
  for (int64_t i = 0; i < 87; ++i) {
    for (int64_t j = 0; j < 60; ++j) sample.w(i, j) = layer.w(i * 700 / 87, j);
  }
  double least = std::numeric_limits<double>::infinity();
  for (const DampingCandidate& step : ladder->certificate.damping_candidates) {
    ResolvedSpec fixed;
    fixed.damping_rule = DampingRule::kAbsolute;
    fixed.damping_value = step.lambda;
    const auto alone = testing::Quantize(sample, fixed);
    ASSERT_TRUE(alone.ok()) << alone.status();
    EXPECT_EQ(alone->certificate.held_out_rows, 87);
    EXPECT_EQ(alone->certificate.held_out_relative_error, step.held_out_relative_error);
    least = std::min(least, step.held_out_relative_error);
  }
  EXPECT_EQ(ladder->certificate.held_out_relative_error, least);
  // Few rows are all of them.
  testing::RandomLayer small = layer;
  small.w = MakeLayer(1, 60, 9, Inputs::kGaussian, 25).w;
  const auto few = testing::Quantize(small, spec);
  ASSERT_TRUE(few.ok()) << few.status();
  EXPECT_EQ(few->certificate.held_out_rows, 9);
}

// Codes by the quick way in float32 are those of float64, next to ties above all.
TEST(QuantizeLayerTest, TargetsNextToTiesRoundAsInFloat64) {
  constexpr int64_t kColumns = 512;
  for (const float scale : {0.1f, 0.0073f, 3.0f, 1e-30f, 1e-38f, 1e30f}) {
    testing::RandomLayer layer = MakeLayer(2, kColumns, 1, Inputs::kGaussian, 3);
    std::vector<float> values(kColumns);
    for (int64_t j = 0; j < kColumns; ++j) {
      // Ties and what is a few steps of float32 beside them, inside the grid and around its ends.
      const int64_t tie = j / 16;
      auto value =
          static_cast<float>((static_cast<double>(tie) - 15.5) * static_cast<double>(scale));
      for (int64_t step = 0; step < j % 16; ++step) {
        value = std::nextafter(value, j % 2 == 0 ? INFINITY : -INFINITY);
      }
      values[static_cast<size_t>(j)] = value;
      layer.w(0, j) = value;
    }
    ResolvedSpec spec;
    spec.method = Method::kNearest;
    spec.bits = 4;
    spec.grid = std::make_shared<const ExplicitGrid>(ExplicitGrid{{scale}, {}, {}, {}});
    const auto result = testing::Quantize(layer, spec);
    ASSERT_TRUE(result.ok()) << result.status();
    const std::vector<double> weight = testing::TensorValues(*result, "weight");
    for (size_t j = 0; j < kColumns; ++j) {
      const double code = std::clamp(
          std::nearbyint(static_cast<double>(values[j]) / static_cast<double>(scale)), -8.0, 7.0);
      ASSERT_EQ(weight[j], static_cast<double>(scale * static_cast<float>(code)))
          << values[j] << " on " << scale;
    }
  }
}

}  // namespace
}  // namespace certiq::engine
