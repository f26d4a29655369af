// Calls that are tried again, given up, cancelled, or meet their deadline.
#include <latch>
#include <stop_token>
#include <string>
#include <variant>
#include <vector>

#include "certiq/client.h"
#include "certiq/status.h"
#include "fake_server.h"
#include "gtest/gtest.h"
#include "test_client.h"
#include "test_util.h"

namespace certiq {
namespace {

using testing::Answering;
using testing::BusyStatus;
using testing::Contains;
using testing::FakeServer;
using testing::Layer;
using testing::MakeLayer;
using testing::ReceiveAll;
using testing::ServerStream;
using testing::TestClient;

TEST(ClientRetryTest, ComesBackWhenTheServerSaysSo) {
  FakeServer server([](int call, grpc::ServerContext* context, ServerStream* stream) {
    if (call < 3) return BusyStatus(absl::Milliseconds(1500));
    return Answering()(call, context, stream);
  });
  const Layer layer = MakeLayer(4, 8, 5);
  TestClient client(server.address());
  std::vector<int> retried;
  const auto result =
      client->Quantize(layer.Request(), {.progress = [&retried](const ProgressEvent& event) {
                         if (const auto* retry = std::get_if<RetryNotice>(&event)) {
                           retried.push_back(retry->attempt);
                           EXPECT_TRUE(absl::IsResourceExhausted(retry->error));
                         }
                       }});
  EXPECT_TRUE(result.ok()) << result.status();
  EXPECT_EQ(server.calls(), 3);
  EXPECT_EQ(retried, (std::vector<int>{1, 2}));
  ASSERT_EQ(client.waits.size(), 2);
  EXPECT_GE(client.waits[0], absl::Milliseconds(1500));
}

TEST(ClientRetryTest, GivesUpAfterFourTries) {
  FakeServer server(
      [](int, grpc::ServerContext*, ServerStream*) { return BusyStatus(absl::Seconds(1)); });
  const TestClient client(server.address());
  const absl::Status status = client->Quantize(MakeLayer(4, 8, 5).Request()).status();
  EXPECT_TRUE(absl::IsResourceExhausted(status));
  EXPECT_EQ(status.message(), "the queue is full (4 tries)");
  EXPECT_EQ(DetailsOf(status).retry_delay, absl::Seconds(1));
  EXPECT_EQ(server.calls(), 4);
}

TEST(ClientRetryTest, ADrainingServerIsTriedAgain) {
  FakeServer server([](int call, grpc::ServerContext* context, ServerStream* stream) {
    if (call < 4) return grpc::Status(grpc::StatusCode::UNAVAILABLE, "draining");
    return Answering()(call, context, stream);
  });
  const Layer layer = MakeLayer(4, 8, 5);
  ClientOptions options;
  // It answers, if only with a rejection: it is not one that nobody reaches.
  options.retry.unreachable_budget = absl::ZeroDuration();
  EXPECT_TRUE(TestClient(server.address(), options)->Quantize(layer.Request()).ok());
  EXPECT_EQ(server.calls(), 4);
}

TEST(ClientRetryTest, DoesNotWaitForAMinute) {
  FakeServer server(
      [](int, grpc::ServerContext*, ServerStream*) { return BusyStatus(absl::Seconds(61)); });
  const Layer layer = MakeLayer(4, 8, 5);
  const TestClient client(server.address());
  EXPECT_TRUE(absl::IsResourceExhausted(client->Quantize(layer.Request()).status()));
  EXPECT_EQ(client.waits.size(), 0);
}

TEST(ClientRetryTest, DoesNotWaitPastTheDeadline) {
  FakeServer server(
      [](int, grpc::ServerContext*, ServerStream*) { return BusyStatus(absl::Seconds(50)); });
  const Layer layer = MakeLayer(4, 8, 5);
  const TestClient client(server.address());
  const absl::Status status =
      client->Quantize(layer.Request(), {.timeout = absl::Seconds(20)}).status();
  EXPECT_TRUE(absl::IsResourceExhausted(status));
  EXPECT_TRUE(Contains(status.message(), "after the deadline"));
  EXPECT_EQ(client.waits.size(), 0);
}

TEST(ClientRetryTest, AnErrorAfterTheResultHeaderIsNotRepeated) {
  FakeServer server([](int, grpc::ServerContext*, ServerStream* stream) {
    auto frames = GoodAnswer(ReceiveAll(stream));
    frames.resize(4);
    for (const auto& frame : frames) stream->Write(frame);
    return grpc::Status(grpc::StatusCode::UNAVAILABLE, "going down");
  });
  const Layer layer = MakeLayer(4, 8, 5);
  const TestClient client(server.address());
  EXPECT_TRUE(absl::IsUnavailable(client->Quantize(layer.Request()).status()));
  EXPECT_EQ(server.calls(), 1);
}

TEST(ClientRetryTest, NobodyListeningFailsQuickly) {
  std::string address;
  {
    const FakeServer gone(Answering());
    address = gone.address();
  }
  const auto client = Client::Create({.address = address});
  const Layer layer = MakeLayer(4, 8, 5);
  const absl::Time start = absl::Now();
  const absl::Status status = (*client)->Quantize(layer.Request()).status();
  EXPECT_TRUE(absl::IsUnavailable(status)) << status;
  EXPECT_LT(absl::Now() - start, absl::Seconds(4));
}

TEST(ClientRetryTest, CancellingDuringAWaitEndsIt) {
  FakeServer server(
      [](int, grpc::ServerContext*, ServerStream*) { return BusyStatus(absl::Seconds(50)); });
  const Layer layer = MakeLayer(4, 8, 5);
  const auto client = Client::Create({.address = server.address()});
  std::stop_source source;
  QuantizeOptions options;
  options.cancel = source.get_token();
  options.progress = [&source](const ProgressEvent& event) {
    if (std::holds_alternative<RetryNotice>(event)) source.request_stop();
  };
  EXPECT_TRUE(absl::IsCancelled((*client)->Quantize(layer.Request(), options).status()));
}

TEST(ClientCancelTest, AServerThatNeverReadsIsLeft) {
  std::latch client_returned(1);
  FakeServer server([&client_returned](int, grpc::ServerContext*, ServerStream* stream) {
    v1::QuantizeResponse frame;
    frame.mutable_progress()->set_phase(v1::PHASE_QUEUE);
    stream->Write(frame);
    client_returned.wait();
    return grpc::Status::CANCELLED;
  });
  const Layer layer = MakeLayer(1, 1000, 20'000);
  std::stop_source source;
  QuantizeOptions options;
  options.cancel = source.get_token();
  options.progress = [&source](const ProgressEvent& event) {
    if (std::holds_alternative<v1::Progress>(event)) source.request_stop();
  };
  const TestClient client(server.address());
  const absl::Status status = client->Quantize(layer.Request(), options).status();
  client_returned.count_down();
  EXPECT_TRUE(absl::IsCancelled(status)) << status;
}

TEST(ClientCancelTest, StoppedBeforeItStarts) {
  FakeServer server(Answering());
  std::stop_source source;
  source.request_stop();
  const Layer layer = MakeLayer(4, 8, 5);
  const TestClient client(server.address());
  QuantizeOptions options;
  options.cancel = source.get_token();
  EXPECT_TRUE(absl::IsCancelled(client->Quantize(layer.Request(), options).status()));
}

TEST(ClientCancelTest, AnAnswerThatNeverComesMeetsTheDeadline) {
  std::latch client_returned(1);
  FakeServer server([&client_returned](int, grpc::ServerContext*, ServerStream* stream) {
    ReceiveAll(stream);
    client_returned.wait();
    return grpc::Status::CANCELLED;
  });
  const Layer layer = MakeLayer(4, 8, 5);
  const TestClient client(server.address());
  const absl::Status status =
      client->Quantize(layer.Request(), {.timeout = absl::Milliseconds(200)}).status();
  client_returned.count_down();
  EXPECT_TRUE(absl::IsDeadlineExceeded(status)) << status;
}

}  // namespace
}  // namespace certiq
