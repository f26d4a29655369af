#include "job/result.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cstddef>
#include <memory>
#include <string>
#include <utility>
#include <vector>

namespace certiq::server {
namespace {

engine::ResultTensor Tensor(const char* role, std::vector<int64_t> shape) {
  int64_t count = 1;
  for (const int64_t n : shape) count *= n;
  engine::ResultTensor tensor{role, engine::DType::kF32, std::move(shape), {}};
  tensor.bytes.resize(static_cast<size_t>(count) * 4);
  for (size_t i = 0; i < tensor.bytes.size(); ++i) tensor.bytes[i] = std::byte(i * 7);
  return tensor;
}

engine::QuantizedLayer SomeLayer() {
  engine::QuantizedLayer layer;
  layer.tensors = {Tensor("weight", {5, 6}), Tensor("none", {0, 6}), Tensor("g_idx", {6}),
                   Tensor("scales", {5, 1})};
  layer.certificate.rows = 5;
  layer.certificate.relative_error = 0.25;
  layer.certificate.lambda_used = 3;
  layer.certificate.row_error = {1, 2, 3, 4, 5};
  layer.certificate.row_bound = {2, 4, 6, 8, 10};
  return layer;
}

std::string TensorBytes(const engine::QuantizedLayer& layer) {
  std::string bytes;
  for (const engine::ResultTensor& tensor : layer.tensors) {
    for (const std::byte value : tensor.bytes) bytes += static_cast<char>(value);
  }
  return bytes;
}

TEST(ResultReaderTest, PiecesOfAnySizeAddUpFromAnyOffset) {
  const std::string whole = TensorBytes(SomeLayer());
  const auto total = static_cast<int64_t>(whole.size());
  CertificateFacts facts;
  facts.queue_seconds = 3;
  for (const int64_t step : {1, 24, 50, 1 << 20}) {
    for (const int64_t offset : {int64_t{0}, int64_t{7}, int64_t{120}, total}) {
      const ResultRecord record = DescribeResult(SomeLayer());
      EXPECT_EQ(record.tensor_bytes(), 4 * (30 + 6 + 5));
      EXPECT_EQ(record.header().tensors(0).name(), "weight");
      EXPECT_EQ(record.header().tensors(2).shape_size(), 1);
      EXPECT_EQ(record.relative_error(), 0.25);
      EXPECT_EQ(record.lambda_used(), 3);
      ResultReader reader(record, MakeResultBlob(SomeLayer(), facts), offset);
      std::string read;
      while (reader.at_tensors()) {
        EXPECT_EQ(reader.offset(), offset + static_cast<int64_t>(read.size()));
        std::string piece;
        ASSERT_TRUE(reader.ReadBytes(std::min(step, total - reader.offset()), piece).ok());
        read += piece;
      }
      EXPECT_EQ(read, whole.substr(static_cast<size_t>(offset)));
      v1::Certificate certificate;
      ASSERT_FALSE(reader.at_end());
      while (!reader.at_end()) {
        v1::Certificate part;
        ASSERT_TRUE(reader.ReadCertificate(part).ok());
        certificate.MergeFrom(part);
      }
      EXPECT_EQ(certificate.phase_seconds().queue(), 3);
      EXPECT_EQ(certificate.relative_error(), 0.25);
      EXPECT_EQ(certificate.row_error_size(), 5);
      EXPECT_EQ(certificate.row_bound(4), 10);
    }
  }
}

// The first bytes of another blob.
class CutReader final : public BlobReader {
 public:
  CutReader(std::unique_ptr<BlobReader> whole, int64_t bytes)
      : whole_(std::move(whole)), bytes_(bytes) {}
  int64_t bytes() const override { return bytes_; }
  absl::Status Read(int64_t offset, std::span<std::byte> to) const override {
    return whole_->Read(offset, to);
  }

 private:
  const std::unique_ptr<BlobReader> whole_;
  const int64_t bytes_;
};

TEST(ResultReaderTest, WhatIsCutOffIsDataLoss) {
  const ResultRecord record = DescribeResult(SomeLayer());
  const int64_t whole = MakeResultBlob(SomeLayer(), {})->bytes();
  for (int64_t bytes = 0; bytes < whole; ++bytes) {
    // Cut right behind the tensors it would be a result without a certificate.
    if (bytes == record.tensor_bytes()) continue;
    ResultReader reader(record, std::make_unique<CutReader>(MakeResultBlob(SomeLayer(), {}), bytes),
                        0);
    std::string tensors;
    absl::Status status = reader.ReadBytes(record.tensor_bytes(), tensors);
    while (status.ok() && !reader.at_end()) {
      v1::Certificate part;
      status = reader.ReadCertificate(part);
    }
    EXPECT_TRUE(absl::IsDataLoss(status)) << bytes << ": " << status;
  }
}

}  // namespace
}  // namespace certiq::server
