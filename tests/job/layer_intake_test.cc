#include "job/layer_intake.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "base/status.h"
#include "support/layers.h"
#include "support/text.h"

namespace certiq::server {
namespace {

using testing::Layer;
using testing::LayerRequestFor;
using testing::MakeRandomLayer;
using testing::RowBytes;

class LayerIntakeTest : public ::testing::Test {
 protected:
  absl::StatusOr<std::unique_ptr<LayerIntake>> Create(const LayerRequest& request) {
    return LayerIntake::Create(request, budget_, executor_, cancelled_);
  }
  std::unique_ptr<LayerIntake> MustCreate(const LayerRequest& request) {
    auto intake = Create(request);
    EXPECT_TRUE(intake.ok()) << intake.status();
    return *std::move(intake);
  }
  static absl::Status Weights(LayerIntake& intake, const Layer& layer, int64_t begin, int64_t end) {
    return intake.AppendWeights(begin, RowBytes(layer.weights, layer.features, begin, end));
  }
  static absl::Status Activations(LayerIntake& intake, const Layer& layer, int64_t begin,
                                  int64_t end) {
    return intake.AppendActivations(begin, RowBytes(layer.x, layer.features, begin, end));
  }
  static void ExpectInvalid(const absl::Status& status, const char* field, const char* text) {
    EXPECT_TRUE(absl::IsInvalidArgument(status)) << status;
    EXPECT_EQ(base::FieldOf(status).value_or("(none)"), field) << status;
    EXPECT_CONTAINS(status.message(), text);
  }

  ByteBudget budget_{int64_t{1} << 40};
  engine::SerialExecutor executor_;
  engine::Cancellation cancelled_;
  const Layer layer_ = MakeRandomLayer(5, 12, 300);
};

TEST_F(LayerIntakeTest, WholeLayerArrives) {
  auto intake = MustCreate(LayerRequestFor(layer_));
  EXPECT_EQ(intake->fraction(), 0);
  ASSERT_TRUE(Weights(*intake, layer_, 0, 2).ok());
  ASSERT_TRUE(Activations(*intake, layer_, 0, 299).ok());
  ASSERT_TRUE(Weights(*intake, layer_, 2, 5).ok());
  ASSERT_TRUE(Activations(*intake, layer_, 299, 300).ok());
  EXPECT_EQ(intake->fraction(), 1);
  auto ready = intake->Finish();
  ASSERT_TRUE(ready.ok()) << ready.status();
  EXPECT_EQ(ready->problem.statistics->tokens, 300);
  std::vector<float> row(12);
  for (int64_t r = 0; r < 5; ++r) {
    ready->problem.weights.GetRow(r, row.data());
    EXPECT_TRUE(std::equal(row.begin(), row.end(), layer_.weights.begin() + r * 12));
  }
  double expected = 0;
  for (int64_t t = 0; t < 300; ++t) {
    expected += static_cast<double>(layer_.x[t * 12 + 3]) * layer_.x[t * 12 + 7];
  }
  EXPECT_NEAR(ready->problem.statistics->gram.at(3, 7), expected, 1e-3);
}

TEST_F(LayerIntakeTest, ChunksDoNotChangeTheSums) {
  const auto sums = [&](int64_t step) {
    auto intake = MustCreate(LayerRequestFor(layer_));
    EXPECT_TRUE(Weights(*intake, layer_, 0, 5).ok());
    for (int64_t t = 0; t < 300; t += step) {
      EXPECT_TRUE(Activations(*intake, layer_, t, std::min<int64_t>(300, t + step)).ok());
    }
    std::vector<double> out;
    const auto ready = intake->Finish();
    for (int64_t i = 0; i < 12; ++i) {
      for (int64_t j = i; j < 12; ++j) out.push_back(ready->problem.statistics->gram.at(i, j));
    }
    return out;
  };
  const std::vector<double> expected = sums(300);
  for (const int64_t step : {1, 7, 128, 256, 299}) EXPECT_EQ(sums(step), expected) << step;
}

TEST_F(LayerIntakeTest, ReservesFirstAndGivesEverythingBack) {
  const LayerRequest request = LayerRequestFor(layer_);
  {
    auto intake = MustCreate(request);
    EXPECT_EQ(budget_.reserved(), LayerIntake::BytesFor(request));
    ASSERT_TRUE(Weights(*intake, layer_, 0, 5).ok());
    ASSERT_TRUE(Activations(*intake, layer_, 0, 300).ok());
    const auto ready = intake->Finish();
    ASSERT_TRUE(ready.ok());
    intake.reset();
    EXPECT_EQ(budget_.reserved(), ready->reservation.bytes());
    EXPECT_EQ(budget_.reserved(), engine::PeakBytes(request.spec, 5, 12));
  }
  EXPECT_EQ(budget_.reserved(), 0);
}

TEST_F(LayerIntakeTest, OverBudgetIsRefusedWithADelay) {
  const LayerRequest request = LayerRequestFor(layer_);
  ByteBudget small(LayerIntake::BytesFor(request));
  auto first = LayerIntake::Create(request, small, executor_, cancelled_);
  ASSERT_TRUE(first.ok());
  const auto second = LayerIntake::Create(request, small, executor_, cancelled_);
  EXPECT_TRUE(absl::IsResourceExhausted(second.status()));
  EXPECT_EQ(base::RetryAfterOf(second.status()), base::kRetrySoon);
  ByteBudget smaller(LayerIntake::BytesFor(request) - 1);
  const auto never = LayerIntake::Create(request, smaller, executor_, cancelled_);
  EXPECT_EQ(base::RetryAfterOf(never.status()), std::nullopt);
}

TEST_F(LayerIntakeTest, HugeLayerIsCountedWithoutOverflow) {
  LayerRequest request = LayerRequestFor(layer_);
  request.rows = kMaxWeights / kMaxFeatures;
  request.features = request.x_features = kMaxFeatures;
  request.tokens = kMaxTokens;
  request.weight_dtype = request.x_dtype = engine::DType::kF64;
  EXPECT_GT(LayerIntake::BytesFor(request), kMaxWeights);
  EXPECT_TRUE(Create(request).ok());
}

TEST_F(LayerIntakeTest, SizesOutOfRangeNameTheField) {
  constexpr int64_t kHuge = std::numeric_limits<int64_t>::max();
  for (const int64_t bad : {int64_t{0}, int64_t{-1}, kMaxRows + 1, kHuge}) {
    LayerRequest request = LayerRequestFor(layer_);
    request.rows = bad;
    ExpectInvalid(Create(request).status(), "weight.shape", "output channels");
  }
  for (const int64_t bad : {int64_t{0}, int64_t{-7}, kMaxFeatures + 1, kHuge}) {
    LayerRequest request = LayerRequestFor(layer_);
    request.features = request.x_features = bad;
    ExpectInvalid(Create(request).status(), "weight.shape", "input features");
  }
  for (const int64_t bad : {int64_t{0}, int64_t{-7}, kMaxTokens + 1, kHuge}) {
    LayerRequest request = LayerRequestFor(layer_);
    request.tokens = bad;
    ExpectInvalid(Create(request).status(), "x.shape", "tokens");
  }
  LayerRequest request = LayerRequestFor(layer_);
  request.rows = kMaxRows;
  request.features = request.x_features = kMaxFeatures;
  ExpectInvalid(Create(request).status(), "weight.shape", "elements");
  EXPECT_EQ(budget_.reserved(), 0);
}

TEST_F(LayerIntakeTest, FeaturesMustAgree) {
  LayerRequest request = LayerRequestFor(layer_);
  request.x_features = 13;
  ExpectInvalid(Create(request).status(), "x.shape", "[300, 13]");
}

TEST_F(LayerIntakeTest, WeightsMustBeFloating) {
  LayerRequest request = LayerRequestFor(layer_);
  request.weight_dtype = engine::DType::kI32;
  ExpectInvalid(Create(request).status(), "weight.dtype", "got I32");
  request.weight_dtype = engine::DType::kF16;
  request.x_dtype = engine::DType::kU8;
  EXPECT_TRUE(Create(request).ok());
}

TEST_F(LayerIntakeTest, OffsetsAreStrict) {
  auto intake = MustCreate(LayerRequestFor(layer_));
  ExpectInvalid(Weights(*intake, layer_, 1, 2), "weight.row_offset", "expected 0");
  ASSERT_TRUE(Weights(*intake, layer_, 0, 2).ok());
  ExpectInvalid(Weights(*intake, layer_, 0, 2), "weight.row_offset", "expected 2");
  ExpectInvalid(intake->AppendWeights(-1, RowBytes(layer_.weights, 12, 0, 1)), "weight.row_offset",
                "got -1");
  ExpectInvalid(Activations(*intake, layer_, 5, 6), "activation.row_offset", "expected 0");
}

TEST_F(LayerIntakeTest, RowsAreWhole) {
  auto intake = MustCreate(LayerRequestFor(layer_));
  const auto bytes = RowBytes(layer_.weights, 12, 0, 1);
  ExpectInvalid(intake->AppendWeights(0, bytes.first(47)), "weight.data", "whole rows of 48 bytes");
  ExpectInvalid(intake->AppendWeights(0, {}), "weight.data", "got 0 bytes");
  ExpectInvalid(intake->AppendActivations(0, bytes.first(1)), "activation.x", "whole rows");
}

TEST_F(LayerIntakeTest, RowsStayWithinTheShape) {
  auto intake = MustCreate(LayerRequestFor(layer_));
  ASSERT_TRUE(Weights(*intake, layer_, 0, 4).ok());
  ExpectInvalid(intake->AppendWeights(4, RowBytes(layer_.weights, 12, 0, 2)), "weight.data",
                "at most the 1 rows");
  const Layer longer = MakeRandomLayer(1, 12, 301);
  ExpectInvalid(Activations(*intake, longer, 0, 301), "activation.x", "got 301");
}

TEST_F(LayerIntakeTest, NonFiniteValuesAreRefusedWithTheirPosition) {
  Layer layer = layer_;
  layer.weights[2 * 12 + 5] = std::nanf("");
  layer.x[290 * 12 + 11] = -std::numeric_limits<float>::infinity();
  auto intake = MustCreate(LayerRequestFor(layer));
  ASSERT_TRUE(Weights(*intake, layer, 0, 1).ok());
  ExpectInvalid(Weights(*intake, layer, 1, 5), "weight.data", "row 2, column 5");
  auto another = MustCreate(LayerRequestFor(layer));
  ASSERT_TRUE(Activations(*another, layer, 0, 270).ok());
  ExpectInvalid(Activations(*another, layer, 270, 300), "activation.x", "row 290, column 11");
}

// Rows that are held out are in sums of their own, whatever the chunks.
TEST_F(LayerIntakeTest, HeldOutRowsStayApart) {
  LayerRequest request = LayerRequestFor(layer_);
  request.held_out_fraction = 0.25;
  request.sequence_rows = 20;
  const engine::HeldOutSplit split(0.25, 20, "");
  double fit = 0;
  double held = 0;
  int64_t held_tokens = 0;
  for (int64_t t = 0; t < 300; ++t) {
    const double square = std::pow(static_cast<double>(layer_.x[t * 12 + 5]), 2);
    (split.IsHeldOut(t) ? held : fit) += square;
    held_tokens += split.IsHeldOut(t) ? 1 : 0;
  }
  ASSERT_GT(held_tokens, 40);
  for (const int64_t step : {1, 7, 300}) {
    auto intake = MustCreate(request);
    ASSERT_TRUE(Weights(*intake, layer_, 0, 5).ok());
    for (int64_t t = 0; t < 300; t += step) {
      ASSERT_TRUE(Activations(*intake, layer_, t, std::min<int64_t>(t + step, 300)).ok());
    }
    auto ready = intake->Finish();
    ASSERT_TRUE(ready.ok()) << ready.status();
    ASSERT_TRUE(ready->problem.held_out != nullptr);
    EXPECT_EQ(ready->problem.held_out->tokens, held_tokens);
    EXPECT_EQ(ready->problem.statistics->tokens, 300 - held_tokens);
    EXPECT_NEAR(ready->problem.held_out->gram.at(5, 5), held, 1e-5 * held);
    EXPECT_NEAR(ready->problem.statistics->gram.at(5, 5), fit, 1e-5 * fit);
  }
}

TEST_F(LayerIntakeTest, MismatchedInputsKeepTheirDifference) {
  LayerRequest request = LayerRequestFor(layer_);
  request.x_quantized_dtype = engine::DType::kF32;
  request.x_quantized_tokens = request.tokens;
  request.x_quantized_features = request.features;
  auto intake = MustCreate(request);
  ASSERT_TRUE(Weights(*intake, layer_, 0, 5).ok());
  const auto x = RowBytes(layer_.x, 12, 0, 300);
  // X~ = X: nothing differs.
  ASSERT_TRUE(intake->AppendActivations(0, x, x).ok());
  auto ready = intake->Finish();
  ASSERT_TRUE(ready.ok()) << ready.status();
  ASSERT_TRUE(ready->problem.statistics->mismatch.has_value());
  EXPECT_GT(ready->problem.statistics->gram.at(2, 2), 0);
  EXPECT_EQ(ready->problem.statistics->mismatch->residual.at(2, 2), 0);
}

TEST_F(LayerIntakeTest, NonFiniteRowIsCountedAsTheClientCounts) {
  Layer bad = layer_;
  bad.x[static_cast<size_t>(217 * 12 + 4)] = std::numeric_limits<float>::infinity();
  LayerRequest request = LayerRequestFor(bad);
  request.held_out_fraction = 0.25;
  request.sequence_rows = 20;
  auto intake = MustCreate(request);
  ExpectInvalid(Activations(*intake, bad, 0, 300), "activation.x", "row 217, column 4");
}

TEST_F(LayerIntakeTest, MissingRowsAreCounted) {
  auto intake = MustCreate(LayerRequestFor(layer_));
  ExpectInvalid(intake->Finish().status(), "weight", "expected 5 rows, got 0");
  ASSERT_TRUE(Weights(*intake, layer_, 0, 3).ok());
  ExpectInvalid(intake->Finish().status(), "weight",
                "expected 5 rows, got 3 when the stream ended");
  ASSERT_TRUE(Weights(*intake, layer_, 3, 5).ok());
  ASSERT_TRUE(Activations(*intake, layer_, 0, 20).ok());
  ExpectInvalid(intake->Finish().status(), "x", "expected 300 rows, got 20");
}

TEST_F(LayerIntakeTest, CancellationStopsFolding) {
  auto intake = MustCreate(LayerRequestFor(layer_));
  cancelled_.Cancel(absl::StatusCode::kDeadlineExceeded);
  EXPECT_TRUE(absl::IsDeadlineExceeded(Activations(*intake, layer_, 0, 300)));
}

}  // namespace
}  // namespace certiq::server
