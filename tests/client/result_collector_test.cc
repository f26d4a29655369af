#include "result_collector.h"

#include <functional>
#include <string>
#include <utility>
#include <vector>

#include "fake_server.h"
#include "google/protobuf/unknown_field_set.h"
#include "gtest/gtest.h"
#include "test_util.h"

namespace certiq {
namespace {

using testing::Contains;

using Frames = std::vector<v1::QuantizeResponse>;

// A correct answer for weights [4, 8]: two progress frames, header, two chunks of "weight", one of
// "scales", two of the certificate.
Frames Good() {
  testing::Upload upload;
  upload.header.mutable_weight()->add_shape(4);
  upload.header.mutable_weight()->add_shape(8);
  upload.weight = std::string(128, 'w');
  return testing::GoodAnswer(upload);
}

absl::StatusOr<QuantizeResult> Collect(const Frames& frames) {
  ResultCollector collector(4, 8);
  for (const v1::QuantizeResponse& frame : frames) {
    if (absl::Status status = collector.Add(frame); !status.ok()) return status;
  }
  return std::move(collector).Finish();
}

// What the change of a correct answer is rejected with.
std::string Rejection(const std::function<void(Frames&)>& change) {
  Frames frames = Good();
  change(frames);
  const absl::Status status = Collect(frames).status();
  EXPECT_EQ(status.code(), absl::StatusCode::kInternal) << status;
  return std::string(status.message());
}

v1::ResultHeader& Header(Frames& frames) { return *frames[2].mutable_result(); }

TEST(ResultCollectorTest, TakesACorrectAnswer) {
  const auto result = Collect(Good());
  ASSERT_TRUE(result.ok()) << result.status();
  EXPECT_EQ(result->tensors.size(), 2);
  EXPECT_EQ(result->certificate.row_bound().size(), 4);
}

TEST(ResultCollectorTest, TensorsMayInterleaveAndProgressComeLate) {
  Frames frames = Good();
  std::swap(frames[4], frames[5]);
  frames.insert(frames.begin() + 4, frames[0]);
  EXPECT_TRUE(Collect(frames).ok());
}

TEST(ResultCollectorTest, FramesOfANewerContractAreSkippedAndEmptyOnesRejected) {
  Frames frames = Good();
  frames.insert(frames.begin(), v1::QuantizeResponse());
  EXPECT_FALSE(Collect(frames).ok());
  frames[0].GetReflection()->MutableUnknownFields(&frames[0])->AddVarint(99, 1);
  EXPECT_TRUE(Collect(frames).ok());
}

TEST(ResultCollectorTest, RejectsHeaders) {
  EXPECT_TRUE(Contains(Rejection([](Frames& f) { f.insert(f.begin(), f[2]); }), "a second one"));
  EXPECT_TRUE(Contains(Rejection([](Frames& f) { Header(f).clear_tensors(); }), "1 to 64, got 0"));
  EXPECT_TRUE(Contains(Rejection([](Frames& f) {
                         for (int i = 0; i < 64; ++i)
                           *Header(f).add_tensors() = Header(f).tensors(0);
                       }),
                       "1 to 64, got 66"));
  EXPECT_TRUE(Contains(Rejection([](Frames& f) { Header(f).set_total_bytes(143); }),
                       "total_bytes: expected 144"));
  EXPECT_TRUE(Contains(
      Rejection([](Frames& f) { Header(f).mutable_tensors(1)->set_name("weight"); }), "once"));
  EXPECT_TRUE(
      Contains(Rejection([](Frames& f) { Header(f).mutable_tensors(1)->set_name(""); }), "name"));
  EXPECT_TRUE(Contains(
      Rejection([](Frames& f) { Header(f).mutable_tensors(1)->set_name(std::string(257, 'n')); }),
      "name"));
  EXPECT_TRUE(Contains(Rejection([](Frames& f) {
                         Header(f).mutable_tensors(1)->set_dtype(v1::DATA_TYPE_UNSPECIFIED);
                       }),
                       "dtype"));
  EXPECT_TRUE(Contains(Rejection([](Frames& f) {
                         Header(f).mutable_tensors(1)->set_dtype(static_cast<v1::DataType>(77));
                       }),
                       "dtype"));
  EXPECT_TRUE(Contains(Rejection([](Frames& f) { Header(f).mutable_tensors(1)->clear_shape(); }),
                       "dimensions"));
  EXPECT_TRUE(Contains(Rejection([](Frames& f) { Header(f).mutable_tensors(1)->set_shape(0, 0); }),
                       "dimensions of at least 1"));
  EXPECT_TRUE(Contains(Rejection([](Frames& f) { Header(f).mutable_tensors(1)->set_shape(0, -1); }),
                       "dimensions of at least 1"));
  EXPECT_TRUE(Contains(Rejection([](Frames& f) {
                         for (int i = 0; i < 7; ++i) Header(f).mutable_tensors(1)->add_shape(1);
                       }),
                       "1 to 8 dimensions"));
  EXPECT_TRUE(
      Contains(Rejection([](Frames& f) { Header(f).mutable_tensors(1)->set_shape(0, INT64_MAX); }),
               "64-bit"));
  EXPECT_TRUE(Contains(
      Rejection([](Frames& f) { Header(f).mutable_tensors(1)->set_shape(0, INT64_MAX / 8); }),
      "at most"));
  EXPECT_TRUE(Contains(Rejection([](Frames& f) { Header(f).mutable_tensors(0)->set_shape(1, 7); }),
                       "[4, 8]"));
  EXPECT_TRUE(Contains(
      Rejection([](Frames& f) { Header(f).mutable_tensors(0)->set_dtype(v1::DATA_TYPE_I32); }),
      "floating"));
}

TEST(ResultCollectorTest, RejectsChunks) {
  EXPECT_TRUE(Contains(Rejection([](Frames& f) { f.erase(f.begin() + 2); }), "header first"));
  EXPECT_TRUE(
      Contains(Rejection([](Frames& f) { f[3].mutable_chunk()->set_tensor(2); }), "below 2"));
  EXPECT_TRUE(
      Contains(Rejection([](Frames& f) { f[3].mutable_chunk()->set_tensor(-1); }), "got -1"));
  EXPECT_TRUE(Contains(Rejection([](Frames& f) { f[3].mutable_chunk()->set_row_offset(1); }),
                       "row_offset: expected 0, got 1"));
  EXPECT_TRUE(Contains(Rejection([](Frames& f) { f[3].mutable_chunk()->set_row_offset(-1); }),
                       "row_offset"));
  EXPECT_TRUE(Contains(Rejection([](Frames& f) { std::swap(f[3], f[4]); }), "row_offset"));
  EXPECT_TRUE(
      Contains(Rejection([](Frames& f) { f[3].mutable_chunk()->clear_data(); }), "whole rows"));
  EXPECT_TRUE(
      Contains(Rejection([](Frames& f) { f[3].mutable_chunk()->mutable_data()->pop_back(); }),
               "whole rows of 32 bytes, got 63"));
  EXPECT_TRUE(
      Contains(Rejection([](Frames& f) { f[4].mutable_chunk()->mutable_data()->append(32, 'x'); }),
               "at most the 64 bytes"));
  EXPECT_TRUE(Contains(Rejection([](Frames& f) {
                         auto chunk = f[5];
                         chunk.mutable_chunk()->set_row_offset(4);
                         f.push_back(chunk);
                       }),
                       "none after the certificate"));
}

TEST(ResultCollectorTest, RejectsCertificates) {
  EXPECT_TRUE(Contains(Rejection([](Frames& f) { f = {f[6]}; }), "header first"));
  EXPECT_TRUE(Contains(Rejection([](Frames& f) { std::swap(f[5], f[6]); }),
                       "every row of \"scales\" first"));
  EXPECT_TRUE(Contains(Rejection([](Frames& f) { f[6].mutable_certificate()->set_rows(5); }),
                       "rows 4 and features 8, got 5 and 8"));
}

TEST(ResultCollectorTest, LimitsLeaveRoomForEveryRealResult) {
  for (const int64_t rows : {1, 7, 4096}) {
    for (const int64_t features : {1, 8, 9, 4096}) {
      const int64_t groups = (features + 7) / 8;
      const int64_t dense = 4 * rows * features + 8 * rows * groups + 4 * features;
      const int64_t packed = rows * (features + 4) + 8 * rows * groups + 4 * features + 4 * groups;
      EXPECT_GE(ResultCollector::MaxResultBytes(rows, features), std::max(dense, packed));
    }
  }
  EXPECT_EQ(ResultCollector::MaxResultBytes(int64_t{1} << 40, int64_t{1} << 40), INT64_MAX);
}

}  // namespace
}  // namespace certiq
