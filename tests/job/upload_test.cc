#include "job/upload.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include "base/sha256.h"
#include "base/status.h"
#include "engine/gram/held_out_split.h"
#include "support/backend_examples.h"
#include "support/layers.h"
#include "support/text.h"

namespace certiq::server::testing {
namespace {

using certiq::testing::Layer;
using certiq::testing::LayerRequestFor;
using certiq::testing::MakeRandomLayer;
using certiq::testing::RowBytes;

std::string DigestOf(const std::vector<float>& values) {
  base::Sha256 digest;
  digest.Update({reinterpret_cast<const char*>(values.data()), values.size() * sizeof(float)});
  return digest.Finish();
}

class UploadTest : public ::testing::Test {
 protected:
  void SetUp() override {
    server_.Start();
    // The claim that follows the start is a write too.
    Settle(*server_);
  }

  std::unique_ptr<Upload> MustCreate(const JobRequest& request) {
    return std::make_unique<Upload>(server_->environment(), request, Admission(), cancelled_,
                                    std::nullopt);
  }
  static absl::Status Weights(Upload& upload, const Layer& layer, int64_t begin, int64_t end) {
    return upload.AppendWeights(begin, RowBytes(layer.weights, layer.features, begin, end));
  }
  static absl::Status Activations(Upload& upload, const Layer& layer, int64_t begin, int64_t end) {
    return upload.AppendActivations(begin, RowBytes(layer.x, layer.features, begin, end), {});
  }
  static void ExpectInvalid(const absl::Status& status, const char* field, const char* text) {
    EXPECT_TRUE(absl::IsInvalidArgument(status)) << status;
    EXPECT_EQ(base::FieldOf(status).value_or("(none)"), field) << status;
    EXPECT_CONTAINS(status.message(), text);
  }

  Server server_{StoreKind::kMemory};
  engine::Cancellation cancelled_;
  const Layer layer_ = MakeRandomLayer(5, 12, 300);
};

TEST_F(UploadTest, WholeLayerArrives) {
  auto upload = MustCreate(LayerRequestFor(layer_));
  EXPECT_EQ(upload->fraction(), 0);
  ASSERT_TRUE(Weights(*upload, layer_, 0, 2).ok());
  ASSERT_TRUE(Activations(*upload, layer_, 0, 299).ok());
  ASSERT_TRUE(Weights(*upload, layer_, 2, 5).ok());
  ASSERT_TRUE(Activations(*upload, layer_, 299, 300).ok());
  EXPECT_EQ(upload->fraction(), 1);
  ASSERT_TRUE(upload->Finish().ok());
  const engine::StripMatrix weights = upload->TakeWeights();
  const SplitSums sums = upload->TakeSums();
  EXPECT_EQ(sums.fit->tokens, 300);
  EXPECT_EQ(sums.held_out, nullptr);
  std::vector<float> row(12);
  for (int64_t r = 0; r < 5; ++r) {
    weights.GetRow(r, row.data());
    EXPECT_TRUE(std::equal(row.begin(), row.end(), layer_.weights.begin() + r * 12));
  }
  double expected = 0;
  for (int64_t t = 0; t < 300; ++t) {
    expected += static_cast<double>(layer_.x[t * 12 + 3]) * layer_.x[t * 12 + 7];
  }
  EXPECT_NEAR(sums.fit->gram.at(3, 7), expected, 1e-3);
  EXPECT_EQ(upload->facts().weights_sha256, DigestOf(layer_.weights));
  EXPECT_EQ(upload->facts().x_sha256, DigestOf(layer_.x));
  EXPECT_EQ(upload->facts().x_quantized_sha256, "");
  EXPECT_EQ(upload->facts().held_out_fraction, 0);
}

TEST_F(UploadTest, ChunksDoNotChangeTheSums) {
  const auto sums = [&](int64_t step) {
    auto upload = MustCreate(LayerRequestFor(layer_));
    EXPECT_TRUE(Weights(*upload, layer_, 0, 5).ok());
    for (int64_t t = 0; t < 300; t += step) {
      EXPECT_TRUE(Activations(*upload, layer_, t, std::min<int64_t>(300, t + step)).ok());
    }
    std::vector<double> out;
    EXPECT_TRUE(upload->Finish().ok());
    const SplitSums ready = upload->TakeSums();
    for (int64_t i = 0; i < 12; ++i) {
      for (int64_t j = i; j < 12; ++j) out.push_back(ready.fit->gram.at(i, j));
    }
    return out;
  };
  const std::vector<double> expected = sums(300);
  for (const int64_t step : {1, 7, 128, 256, 299}) EXPECT_EQ(sums(step), expected) << step;
}

TEST_F(UploadTest, OffsetsAreStrict) {
  auto upload = MustCreate(LayerRequestFor(layer_));
  ExpectInvalid(Weights(*upload, layer_, 1, 2), "weight.row_offset", "expected 0");
  ASSERT_TRUE(Weights(*upload, layer_, 0, 2).ok());
  ExpectInvalid(Weights(*upload, layer_, 0, 2), "weight.row_offset", "expected 2");
  ExpectInvalid(upload->AppendWeights(-1, RowBytes(layer_.weights, 12, 0, 1)), "weight.row_offset",
                "got -1");
  ExpectInvalid(Activations(*upload, layer_, 5, 6), "activation.row_offset", "expected 0");
}

TEST_F(UploadTest, RowsAreWhole) {
  auto upload = MustCreate(LayerRequestFor(layer_));
  const auto bytes = RowBytes(layer_.weights, 12, 0, 1);
  ExpectInvalid(upload->AppendWeights(0, bytes.first(47)), "weight.data", "whole rows of 48 bytes");
  ExpectInvalid(upload->AppendWeights(0, {}), "weight.data", "got 0 bytes");
  ExpectInvalid(upload->AppendActivations(0, bytes.first(1), {}), "activation.x", "whole rows");
}

TEST_F(UploadTest, RowsStayWithinTheShape) {
  auto upload = MustCreate(LayerRequestFor(layer_));
  ASSERT_TRUE(Weights(*upload, layer_, 0, 4).ok());
  ExpectInvalid(upload->AppendWeights(4, RowBytes(layer_.weights, 12, 0, 2)), "weight.data",
                "at most the 1 rows");
  const Layer longer = MakeRandomLayer(1, 12, 301);
  ExpectInvalid(Activations(*upload, longer, 0, 301), "activation.x", "got 301");
}

TEST_F(UploadTest, NonFiniteValuesAreRefusedWithTheirPosition) {
  Layer layer = layer_;
  layer.weights[2 * 12 + 5] = std::nanf("");
  layer.x[290 * 12 + 11] = -std::numeric_limits<float>::infinity();
  auto upload = MustCreate(LayerRequestFor(layer));
  ASSERT_TRUE(Weights(*upload, layer, 0, 1).ok());
  ExpectInvalid(Weights(*upload, layer, 1, 5), "weight.data", "row 2, column 5");
  auto another = MustCreate(LayerRequestFor(layer));
  ASSERT_TRUE(Activations(*another, layer, 0, 270).ok());
  ExpectInvalid(Activations(*another, layer, 270, 300), "activation.x", "row 290, column 11");
}

// Rows that are held out are in sums of their own, whatever the chunks.
TEST_F(UploadTest, HeldOutRowsStayApart) {
  JobRequest request = LayerRequestFor(layer_);
  request.activations->held_out_fraction = 0.25;
  request.activations->sequence_rows = 20;
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
    auto upload = MustCreate(request);
    ASSERT_TRUE(Weights(*upload, layer_, 0, 5).ok());
    for (int64_t t = 0; t < 300; t += step) {
      ASSERT_TRUE(Activations(*upload, layer_, t, std::min<int64_t>(t + step, 300)).ok());
    }
    ASSERT_TRUE(upload->Finish().ok());
    const SplitSums sums = upload->TakeSums();
    ASSERT_TRUE(sums.held_out != nullptr);
    EXPECT_EQ(upload->facts().held_out_fraction, 0.25);
    EXPECT_EQ(upload->facts().held_out_block_rows, 20);
    EXPECT_EQ(sums.held_out->tokens, held_tokens);
    EXPECT_EQ(sums.fit->tokens, 300 - held_tokens);
    EXPECT_NEAR(sums.held_out->gram.at(5, 5), held, 1e-5 * held);
    EXPECT_NEAR(sums.fit->gram.at(5, 5), fit, 1e-5 * fit);
  }
}

TEST_F(UploadTest, MismatchedInputsKeepTheirDifference) {
  JobRequest request = LayerRequestFor(layer_);
  request.activations->x_quantized_dtype = engine::DType::kF32;
  request.activations->quantized_tokens = 300;
  request.activations->quantized_features = 12;
  auto upload = MustCreate(request);
  ASSERT_TRUE(Weights(*upload, layer_, 0, 5).ok());
  const auto x = RowBytes(layer_.x, 12, 0, 300);
  // X~ = X: nothing differs.
  ExpectInvalid(upload->AppendActivations(0, x, x.first(48)), "activation.x_quantized",
                "expected the 300 rows of x, 14400 bytes, got 48 bytes");
  ASSERT_TRUE(upload->AppendActivations(0, x, x).ok());
  ASSERT_TRUE(upload->Finish().ok());
  const SplitSums sums = upload->TakeSums();
  ASSERT_TRUE(sums.fit->mismatch.has_value());
  EXPECT_GT(sums.fit->gram.at(2, 2), 0);
  EXPECT_EQ(sums.fit->mismatch->residual.at(2, 2), 0);
  EXPECT_EQ(upload->facts().x_quantized_sha256, upload->facts().x_sha256);
}

TEST_F(UploadTest, NonFiniteRowIsCountedAsTheClientCounts) {
  Layer bad = layer_;
  bad.x[static_cast<size_t>(217 * 12 + 4)] = std::numeric_limits<float>::infinity();
  JobRequest request = LayerRequestFor(bad);
  request.activations->held_out_fraction = 0.25;
  request.activations->sequence_rows = 20;
  auto upload = MustCreate(request);
  ExpectInvalid(Activations(*upload, bad, 0, 300), "activation.x", "row 217, column 4");
}

TEST_F(UploadTest, MissingRowsAreCounted) {
  auto upload = MustCreate(LayerRequestFor(layer_));
  ExpectInvalid(upload->Finish(), "weight", "expected 5 rows, got 0");
  ASSERT_TRUE(Weights(*upload, layer_, 0, 3).ok());
  ExpectInvalid(upload->Finish(), "weight", "expected 5 rows, got 3 when the stream ended");
  ASSERT_TRUE(Weights(*upload, layer_, 3, 5).ok());
  ASSERT_TRUE(Activations(*upload, layer_, 0, 20).ok());
  ExpectInvalid(upload->Finish(), "x", "expected 300 rows, got 20");
}

TEST_F(UploadTest, CancellationStopsFolding) {
  const auto upload = MustCreate(LayerRequestFor(layer_));
  cancelled_.Cancel(absl::StatusCode::kDeadlineExceeded);
  EXPECT_TRUE(absl::IsDeadlineExceeded(Activations(*upload, layer_, 0, 300)));
}

TEST_F(UploadTest, OfACalibrationTakesNoActivations) {
  JobRequest request = LayerRequestFor(layer_);
  request.activations.reset();
  const auto upload = MustCreate(request);
  ExpectInvalid(Activations(*upload, layer_, 0, 1), "payload", "expected weights only");
  ASSERT_TRUE(Weights(*upload, layer_, 0, 5).ok());
  EXPECT_EQ(upload->fraction(), 1);
  EXPECT_TRUE(upload->Finish().ok());
}

TEST_F(UploadTest, StoredWeightsGoIntoABlob) {
  JobRequest request = LayerRequestFor(layer_);
  request.activations.reset();
  request.stored = true;
  const auto upload = MustCreate(request);
  ASSERT_TRUE(Weights(*upload, layer_, 0, 2).ok());
  EXPECT_EQ(upload->fraction(), 0.4);
  ASSERT_TRUE(Weights(*upload, layer_, 2, 5).ok());
  ASSERT_TRUE(upload->Finish().ok());
  const auto blob = upload->CommitWeights();
  ASSERT_TRUE(blob.ok()) << blob.status();
  const auto stored = ReadBlob(*server_->environment().storage.blobs, *blob);
  ASSERT_TRUE(stored.ok()) << stored.status();
  const auto sent = RowBytes(layer_.weights, 12, 0, 5);
  EXPECT_TRUE(std::equal(stored->begin(), stored->end(), sent.begin(), sent.end()));
  EXPECT_EQ(upload->facts().weights_sha256, DigestOf(layer_.weights));
}

TEST_F(UploadTest, StoredWeightsAreChecked) {
  Layer layer = layer_;
  layer.weights[2 * 12 + 5] = std::nanf("");
  JobRequest request = LayerRequestFor(layer);
  request.activations.reset();
  request.stored = true;
  const auto upload = MustCreate(request);
  ASSERT_TRUE(Weights(*upload, layer, 0, 1).ok());
  ExpectInvalid(Weights(*upload, layer, 1, 5), "weight.data", "row 2, column 5");
}

// What was sent before is compared, not kept.
TEST_F(UploadTest, ARepeatedUploadStoresNothing) {
  JobRequest request = LayerRequestFor(layer_);
  request.activations.reset();
  request.stored = true;
  Upload upload(server_->environment(), request, Admission(), cancelled_, JobRecord());
  const int64_t writes = server_.plan.writes;
  ASSERT_TRUE(Weights(upload, layer_, 0, 5).ok());
  ASSERT_TRUE(upload.Finish().ok());
  EXPECT_EQ(server_.plan.writes, writes);
  EXPECT_EQ(upload.facts().weights_sha256, DigestOf(layer_.weights));
}

TEST_F(UploadTest, AFullDiskIsTold) {
  JobRequest request = LayerRequestFor(layer_);
  request.activations.reset();
  request.stored = true;
  server_.plan.code = static_cast<int>(absl::StatusCode::kResourceExhausted);
  server_.plan.FailFrom(1);
  const auto upload = MustCreate(request);
  EXPECT_TRUE(absl::IsResourceExhausted(Weights(*upload, layer_, 0, 5)));
}

}  // namespace
}  // namespace certiq::server::testing
