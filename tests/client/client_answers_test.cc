// Answers that break the contract, over the wire: the call fails and nothing of them is used.
#include <functional>
#include <string>
#include <vector>

#include "certiq/client.h"
#include "fake_server.h"
#include "gtest/gtest.h"
#include "test_util.h"

namespace certiq {
namespace {

using testing::Answering;
using testing::Contains;
using testing::FakeServer;
using testing::Handler;
using testing::Layer;
using testing::MakeLayer;
using testing::ReceiveAll;
using testing::ServerStream;

using Frames = std::vector<v1::QuantizeResponse>;

// The status of a call to a server with this handler, which must be called once.
absl::Status StatusOf(Handler handler) {
  FakeServer server(std::move(handler));
  const auto client = Client::Create({.address = server.address()});
  const Layer layer = MakeLayer(4, 8, 5);
  absl::Status status = (*client)->Quantize(layer.Request()).status();
  EXPECT_EQ(server.calls(), 1);
  return status;
}

TEST(BrokenAnswerTest, BrokenFramesAreInternal) {
  const absl::Status status =
      StatusOf(Answering([](Frames* frames) { frames->at(4).mutable_chunk()->set_row_offset(3); }));
  EXPECT_EQ(status.code(), absl::StatusCode::kInternal) << status;
  EXPECT_TRUE(Contains(status.message(), "row_offset: expected 2, got 3"));
}

TEST(BrokenAnswerTest, ATotalTooLargeIsRejectedBeforeMemoryIsTaken) {
  const absl::Status status = StatusOf(Answering([](Frames* frames) {
    auto* const header = frames->at(2).mutable_result();
    header->mutable_tensors(1)->set_shape(0, int64_t{1} << 40);
    header->set_total_bytes((int64_t{4} << 40) + 128);
  }));
  EXPECT_EQ(status.code(), absl::StatusCode::kInternal) << status;
  EXPECT_TRUE(Contains(status.message(), "result: expected at most"));
}

TEST(BrokenAnswerTest, AnOkWithoutCertificateIsDataLoss) {
  const absl::Status status = StatusOf(Answering([](Frames* frames) { frames->resize(6); }));
  EXPECT_EQ(status.code(), absl::StatusCode::kDataLoss) << status;
  EXPECT_TRUE(Contains(status.message(), "without a certificate"));
}

TEST(BrokenAnswerTest, AnOkWithoutAnythingIsDataLoss) {
  const absl::Status status = StatusOf(Answering([](Frames* frames) { frames->clear(); }));
  EXPECT_EQ(status.code(), absl::StatusCode::kDataLoss) << status;
}

TEST(BrokenAnswerTest, AnOkWithinATensorIsDataLoss) {
  const absl::Status status = StatusOf(Answering([](Frames* frames) { frames->resize(4); }));
  EXPECT_EQ(status.code(), absl::StatusCode::kDataLoss) << status;
  EXPECT_TRUE(Contains(status.message(), "expected 128 bytes, got 64"));
}

TEST(BrokenAnswerTest, AnEndlessAnswerIsCutOff) {
  const absl::Status status = StatusOf([](int, grpc::ServerContext*, ServerStream* stream) {
    const Frames frames = GoodAnswer(ReceiveAll(stream));
    for (int i = 0; i < 6; ++i) stream->Write(frames[static_cast<size_t>(i)]);
    while (stream->Write(frames[5])) {
    }
    return grpc::Status::OK;
  });
  EXPECT_EQ(status.code(), absl::StatusCode::kInternal) << status;
}

TEST(BrokenAnswerTest, AnEndlessCertificateIsCutOff) {
  const absl::Status status = StatusOf([](int, grpc::ServerContext*, ServerStream* stream) {
    const Frames frames = GoodAnswer(ReceiveAll(stream));
    for (int i = 0; i < 6; ++i) stream->Write(frames[static_cast<size_t>(i)]);
    v1::QuantizeResponse more;
    more.mutable_certificate()->add_warnings(std::string(1 << 20, 'w'));
    while (stream->Write(more)) {
    }
    return grpc::Status::OK;
  });
  EXPECT_EQ(status.code(), absl::StatusCode::kInternal) << status;
  EXPECT_TRUE(Contains(status.message(), "certificate: expected at most"));
}

TEST(BrokenAnswerTest, AnErrorAfterACompleteResultIsAnError) {
  const absl::Status status =
      StatusOf([](int call, grpc::ServerContext* context, ServerStream* stream) {
        Answering()(call, context, stream);
        return grpc::Status(grpc::StatusCode::INTERNAL, "afterthought");
      });
  EXPECT_EQ(status.message(), "afterthought");
}

TEST(BrokenAnswerTest, AnOkBeforeTheUploadEndedIsInternal) {
  FakeServer server([](int, grpc::ServerContext*, ServerStream* stream) {
    v1::QuantizeRequest header;
    stream->Read(&header);
    return grpc::Status::OK;
  });
  const auto client = Client::Create({.address = server.address()});
  const Layer layer = MakeLayer(1, 1000, 20'000);
  const absl::Status status = (*client)->Quantize(layer.Request()).status();
  EXPECT_EQ(status.code(), absl::StatusCode::kInternal) << status;
}

TEST(BrokenAnswerTest, AFrameOverTheLimitIsNotRetried) {
  const absl::Status status = StatusOf(Answering(
      [](Frames* frames) { frames->at(5).mutable_chunk()->set_data(std::string(5 << 20, 'x')); }));
  EXPECT_EQ(status.code(), absl::StatusCode::kResourceExhausted) << status;
}

TEST(BrokenAnswerTest, AnotherServiceIsUnimplemented) {
  const absl::Status status = StatusOf([](int, grpc::ServerContext*, ServerStream*) {
    return grpc::Status(grpc::StatusCode::UNIMPLEMENTED, "");
  });
  EXPECT_EQ(status.code(), absl::StatusCode::kUnimplemented);
}

}  // namespace
}  // namespace certiq
