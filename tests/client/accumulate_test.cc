// Rows of a stream count once, whatever breaks.
#include <optional>
#include <stop_token>
#include <string>
#include <utility>
#include <vector>

#include "certiq/calibration_client.h"
#include "fake_calibrations.h"
#include "fake_server.h"
#include "gtest/gtest.h"
#include "test_client.h"
#include "test_util.h"

namespace certiq {
namespace {

using testing::BusyStatus;
using testing::Contains;
using testing::FakeCalibrations;
using testing::FakeServer;
using testing::FakeStream;
using testing::MakeTensor;
using testing::PatientClient;
using Sequences = std::vector<std::vector<int64_t>>;

// Ten rows in chunks of two, unless a test says otherwise.
class AccumulateTest : public ::testing::Test {
 protected:
  AccumulateTest() { service_.Add(); }

  StreamOptions Options() const {
    return {.calibration_id = "c1",
            .stream_id = "s",
            .features = 4,
            .x = v1::DATA_TYPE_F32,
            .chunk_rows = 2};
  }
  absl::StatusOr<v1::StreamProgress> Accumulate(const StreamOptions& options) {
    return client_->Accumulate(options, x_.View(), std::nullopt);
  }
  void ExpectComplete(const absl::StatusOr<v1::StreamProgress>& progress) {
    ASSERT_TRUE(progress.ok()) << progress.status();
    EXPECT_EQ(progress->durable(), 5);
    EXPECT_EQ(progress->tokens(), 10);
    EXPECT_EQ(service_.streams["s"].X(), x_.data);
  }
  static grpc::Status Broken() { return {grpc::StatusCode::UNAVAILABLE, "broken"}; }

  OwnedTensor x_ = MakeTensor("x", v1::DATA_TYPE_F32, {10, 4});
  FakeCalibrations service_;
  FakeServer server_{std::vector<grpc::Service*>{&service_}};
  PatientClient<CalibrationClient> client_{server_.address()};
};

TEST_F(AccumulateTest, SendsEveryChunkOnce) {
  ExpectComplete(Accumulate(Options()));
  EXPECT_EQ(service_.sent, (Sequences{{0, 1, 2, 3, 4}}));
  EXPECT_EQ(service_.headers[0].x(), v1::DATA_TYPE_F32);
  EXPECT_EQ(service_.headers[0].x_quantized(), v1::DATA_TYPE_UNSPECIFIED);
  EXPECT_TRUE(client_.waits.empty());
}

TEST_F(AccumulateTest, MismatchedRowsTravelTogether) {
  const OwnedTensor xq = MakeTensor("xq", v1::DATA_TYPE_F16, {10, 4});
  const auto progress = client_->Accumulate(Options(), x_.View(), xq.View());
  ExpectComplete(progress);
  EXPECT_EQ(service_.streams["s"].XQuantized(), xq.data);
  EXPECT_EQ(service_.headers[0].x_quantized(), v1::DATA_TYPE_F16);
}

TEST_F(AccumulateTest, CallsOfAnySizeGiveTheSameChunks) {
  auto stream = client_->OpenStream(Options());
  ASSERT_TRUE(stream.ok()) << stream.status();
  for (const auto& [first, rows] : {std::pair<size_t, size_t>{0, 1}, {1, 4}, {5, 1}, {6, 3}}) {
    TensorView part = x_.View();
    part.shape[0] = static_cast<int64_t>(rows);
    part.data = part.data.substr(16 * first, 16 * rows);
    ASSERT_TRUE((*stream)->Write(part).ok());
  }
  const auto progress = (*stream)->Close();
  ASSERT_TRUE(progress.ok()) << progress.status();
  EXPECT_EQ(progress->tokens(), 9);
  EXPECT_EQ(service_.sent, (Sequences{{0, 1, 2, 3, 4}}));
  // The last chunk is the short one.
  EXPECT_EQ(service_.streams["s"].chunks[3].x().size(), 32);
  EXPECT_EQ(service_.streams["s"].chunks[4].x().size(), 16);
  EXPECT_FALSE((*stream)->Write(x_.View()).ok());
}

// A connection that breaks after chunk k goes on behind it, wherever that is.
class BreakTest : public AccumulateTest, public ::testing::WithParamInterface<size_t> {};

TEST_P(BreakTest, GoesOnWhereTheServerSays) {
  service_.on_chunk = [](int call, FakeStream* stream) -> FakeCalibrations::End {
    if (call == 1 && stream->chunks.size() == GetParam()) return Broken();
    return std::nullopt;
  };
  ExpectComplete(Accumulate(Options()));
  ASSERT_EQ(service_.sent.size(), 2);
  const std::vector<int64_t>& again = service_.sent[1];
  // What was received is not sent twice.
  EXPECT_EQ(again.size(), 5 - GetParam());
  if (!again.empty()) {
    EXPECT_EQ(again.front(), static_cast<int64_t>(GetParam()));
  }
  EXPECT_EQ(client_.waits.size(), 1);
}

TEST_P(BreakTest, ACrashSendsAgainWhatWasNotDurable) {
  service_.durable_every = 2;
  service_.on_chunk = [](int call, FakeStream* stream) -> FakeCalibrations::End {
    if (call > 1 || stream->chunks.size() != GetParam()) return std::nullopt;
    stream->Crash();
    return Broken();
  };
  ExpectComplete(Accumulate(Options()));
  ASSERT_EQ(service_.sent.size(), 2);
  EXPECT_EQ(service_.sent[1].size(), 5 - GetParam() / 2 * 2);
}

INSTANTIATE_TEST_SUITE_P(AfterEachChunk, BreakTest, ::testing::Values(1, 2, 3, 4, 5));

TEST_F(AccumulateTest, ABreakBeforeTheFirstAnswerIsTriedAgain) {
  service_.on_open = [](int call, FakeStream*) -> FakeCalibrations::End {
    if (call < 3) return BusyStatus(absl::Seconds(7));
    return std::nullopt;
  };
  ExpectComplete(Accumulate(Options()));
  ASSERT_EQ(client_.waits.size(), 2);
  // Never earlier than the server asks.
  EXPECT_GE(client_.waits[0], absl::Seconds(7));
  EXPECT_GE(client_.waits[1], absl::Seconds(7));
}

TEST_F(AccumulateTest, ManyBreaksThatEachGetFurtherAreNoReasonToGiveUp) {
  service_.on_chunk = [](int, FakeStream*) -> FakeCalibrations::End { return Broken(); };
  ClientOptions options;
  options.retry.max_attempts = 1;
  const PatientClient<CalibrationClient> client(server_.address(), options);
  ExpectComplete(client->Accumulate(Options(), x_.View(), std::nullopt));
  EXPECT_GE(client.waits.size(), 5);
}

TEST_F(AccumulateTest, AServerThatAlwaysCrashesIsGivenUp) {
  service_.durable_every = 0;
  service_.on_chunk = [](int, FakeStream* stream) -> FakeCalibrations::End {
    stream->Crash();
    return Broken();
  };
  const auto progress = Accumulate(Options());
  EXPECT_TRUE(absl::IsUnavailable(progress.status())) << progress.status();
  // Two minutes of waits that grow to ten seconds.
  EXPECT_GT(client_.waits.size(), 10);
  EXPECT_LT(client_.waits.size(), 40);
}

TEST_F(AccumulateTest, TakenOverByANewerCallIsFinal) {
  service_.on_chunk = [](int, FakeStream* stream) -> FakeCalibrations::End {
    if (stream->chunks.size() < 2) return std::nullopt;
    return grpc::Status(grpc::StatusCode::ABORTED, "a newer call took over");
  };
  auto stream = client_->OpenStream(Options());
  ASSERT_TRUE(stream.ok());
  absl::Status status = (*stream)->Write(x_.View());
  if (status.ok()) status = (*stream)->Close().status();
  EXPECT_TRUE(absl::IsAborted(status)) << status;
  // And stays so.
  EXPECT_TRUE(absl::IsAborted((*stream)->Write(x_.View())));
  EXPECT_TRUE(absl::IsAborted((*stream)->Close().status()));
  EXPECT_EQ(service_.sent.size(), 1);
  EXPECT_TRUE(client_.waits.empty());
}

TEST_F(AccumulateTest, ARestartedProcessSkipsWhatIsThere) {
  service_.on_chunk = [](int call, FakeStream* stream) -> FakeCalibrations::End {
    if (call > 1 || stream->chunks.size() < 3) return std::nullopt;
    return grpc::Status(grpc::StatusCode::CANCELLED, "the first process ends here");
  };
  EXPECT_FALSE(Accumulate(Options()).ok());
  const PatientClient<CalibrationClient> restarted(server_.address());
  ExpectComplete(restarted->Accumulate(Options(), x_.View(), std::nullopt));
  ASSERT_EQ(service_.sent.size(), 2);
  EXPECT_EQ(service_.sent[1], (std::vector<int64_t>{3, 4}));
  // Once more: nothing is left to send.
  ExpectComplete(restarted->Accumulate(Options(), x_.View(), std::nullopt));
  EXPECT_TRUE(service_.sent[2].empty());
}

TEST_F(AccumulateTest, OtherChunksOrFewerRowsThanTheServerHoldsAreRejected) {
  ExpectComplete(Accumulate(Options()));
  StreamOptions other = Options();
  other.chunk_rows = 1;
  absl::Status status = Accumulate(other).status();
  EXPECT_TRUE(absl::IsFailedPrecondition(status)) << status;
  EXPECT_TRUE(Contains(status.message(), "another chunk_rows"));
  TensorView few = x_.View();
  few.shape[0] = 4;
  few.data = few.data.substr(0, 64);
  status = client_->Accumulate(Options(), few, std::nullopt).status();
  EXPECT_TRUE(absl::IsFailedPrecondition(status)) << status;
  EXPECT_TRUE(Contains(status.message(), "these are other rows"));
  EXPECT_EQ(service_.streams["s"].X(), x_.data);
}

TEST_F(AccumulateTest, AFullWindowWaitsForDurability) {
  service_.durable_every = 2;
  StreamOptions options = Options();
  // One chunk is 32 bytes: two are kept, the third waits for the server.
  options.window_bytes = 64;
  ExpectComplete(Accumulate(options));
  EXPECT_EQ(service_.sent, (Sequences{{0, 1, 2, 3, 4}}));
}

TEST_F(AccumulateTest, LosingWhatWasDurableIsDataLoss) {
  StreamOptions options = Options();
  options.window_bytes = 0;  // Each chunk is durable before the next one goes.
  service_.on_chunk = [](int call, FakeStream* stream) -> FakeCalibrations::End {
    if (call > 1 || stream->chunks.size() < 4) return std::nullopt;
    stream->durable = 1;
    stream->Crash();
    return Broken();
  };
  const absl::Status status = Accumulate(options).status();
  EXPECT_TRUE(absl::IsDataLoss(status)) << status;
}

TEST_F(AccumulateTest, PositionsThatMakeNoSenseAreRejected) {
  service_.on_open = [](int, FakeStream* stream) -> FakeCalibrations::End {
    stream->durable = 3;  // More than was received.
    return std::nullopt;
  };
  const absl::Status status = Accumulate(Options()).status();
  EXPECT_EQ(status.code(), absl::StatusCode::kInternal) << status;
  EXPECT_TRUE(client_.waits.empty());
}

TEST_F(AccumulateTest, AnEarlyOkIsNotTakenForTheEnd) {
  service_.durable_every = 0;
  service_.on_chunk = [](int, FakeStream*) -> FakeCalibrations::End { return grpc::Status::OK; };
  EXPECT_EQ(Accumulate(Options()).status().code(), absl::StatusCode::kInternal);
}

TEST_F(AccumulateTest, WhatMakesNoSenseIsRejectedBeforeItIsSent) {
  StreamOptions options = Options();
  options.stream_id = "";
  EXPECT_TRUE(absl::IsInvalidArgument(Accumulate(options).status()));
  options = Options();
  options.chunk_rows = int64_t{1} << 40;
  EXPECT_TRUE(absl::IsInvalidArgument(Accumulate(options).status()));
  options.chunk_rows = -1;
  EXPECT_TRUE(absl::IsInvalidArgument(Accumulate(options).status()));
  EXPECT_TRUE(service_.sent.empty());
  auto stream = client_->OpenStream(Options());
  ASSERT_TRUE(stream.ok());
  const OwnedTensor wide = MakeTensor("wide", v1::DATA_TYPE_F32, {2, 5});
  const OwnedTensor half = MakeTensor("half", v1::DATA_TYPE_F16, {2, 4});
  EXPECT_TRUE(absl::IsInvalidArgument((*stream)->Write(wide.View())));
  EXPECT_TRUE(absl::IsInvalidArgument((*stream)->Write(half.View())));
  EXPECT_TRUE(absl::IsInvalidArgument((*stream)->Write(x_.View(), x_.View())));
  // None of which ended the stream.
  ASSERT_TRUE((*stream)->Write(x_.View()).ok());
  ExpectComplete((*stream)->Close());
}

TEST_F(AccumulateTest, CancellingDuringAWaitEndsIt) {
  service_.on_open = [](int, FakeStream*) -> FakeCalibrations::End { return Broken(); };
  std::stop_source source;
  CallOptions options;
  options.cancel = source.get_token();
  options.progress = [&source](const ProgressEvent&) { source.request_stop(); };
  EXPECT_TRUE(
      absl::IsCancelled(client_->Accumulate(Options(), x_.View(), std::nullopt, options).status()));
}

TEST_F(AccumulateTest, AnUnknownCalibrationIsNotTriedAgain) {
  StreamOptions options = Options();
  options.calibration_id = "c9";
  EXPECT_TRUE(absl::IsNotFound(Accumulate(options).status()));
  EXPECT_TRUE(client_.waits.empty());
}

TEST_F(AccumulateTest, AStreamThatIsLeftEndsItsCall) {
  auto stream = client_->OpenStream(Options());
  ASSERT_TRUE(stream.ok());
  EXPECT_TRUE((*stream)->Write(x_.View()).ok());
  stream->reset();
  // A new one goes on with what the server has by then.
  ExpectComplete(Accumulate(Options()));
}

}  // namespace
}  // namespace certiq
