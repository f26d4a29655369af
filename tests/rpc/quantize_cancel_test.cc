// Calls that end before they are done.

#include <gtest/gtest.h>

#include <algorithm>

#include "support/requests.h"
#include "test_server.h"

namespace certiq::testing {
namespace {

using grpc::StatusCode;

// A second or so of work.
Layer MakeLargeLayer() { return MakeRandomLayer(1024, 2048, 64); }

absl::StatusCode OnlyCode(TestServer& server) {
  EXPECT_TRUE(TestServer::Eventually([&] { return server.finished().size() == 1; }));
  return server.finished().at(0).status.code();
}

TEST(QuantizeCancelTest, BeforeTheHeader) {
  TestServer server;
  Call call(server);
  ASSERT_TRUE(TestServer::Eventually([&] {
    return server.Metric(
               "grpc_server_started_total{grpc_method=\"Quantize\",grpc_service=\"certiq.v1."
               "QuantizationService\",grpc_type=\"bidi_stream\"}") == 1;
  }));
  EXPECT_EQ(server.budget.reserved(), 0);
  call.Cancel();
  EXPECT_EQ(call.Finish().status.error_code(), StatusCode::CANCELLED);
  EXPECT_EQ(OnlyCode(server), absl::StatusCode::kCancelled);
}

TEST(QuantizeCancelTest, WhileReceiving) {
  TestServer server;
  const Layer layer = MakeRandomLayer(8, 16, 32);
  Call call(server);
  call.Send(HeaderFor(layer));
  call.Send(WeightChunk(layer, 0, 4));
  ASSERT_TRUE(call.ReadUntil(v1::PHASE_RECEIVE));
  EXPECT_GT(server.budget.reserved(), 0);
  call.Cancel();
  EXPECT_EQ(call.Finish().status.error_code(), StatusCode::CANCELLED);
  EXPECT_TRUE(server.Idle());
  EXPECT_EQ(OnlyCode(server), absl::StatusCode::kCancelled);
}

TEST(QuantizeCancelTest, WhileQueued) {
  Gate gate;
  TestServer server({.workers = 1});
  server.Block(gate);
  Call call(server);
  call.SendAll(QuantizeRequestsFor(MakeRandomLayer(8, 16, 32)));
  call.Close();
  ASSERT_TRUE(TestServer::Eventually([&] { return server.pool.queue_depth() == 1; }));
  call.Cancel();
  EXPECT_EQ(call.Finish().status.error_code(), StatusCode::CANCELLED);
  // It leaves although no worker is free.
  EXPECT_TRUE(TestServer::Eventually([&] { return server.budget.reserved() == 0; }));
  EXPECT_EQ(server.pool.queue_depth(), 0);
  EXPECT_EQ(OnlyCode(server), absl::StatusCode::kCancelled);
  gate.Open();
}

class QuantizeCancelPhaseTest : public ::testing::TestWithParam<v1::Phase> {};

TEST_P(QuantizeCancelPhaseTest, StopsTheWork) {
  TestServer server;
  Call call(server);
  call.SendAll(QuantizeRequestsFor(MakeLargeLayer()));
  call.Close();
  ASSERT_TRUE(call.ReadUntil(GetParam()));
  call.Cancel();
  EXPECT_EQ(call.Finish().status.error_code(), StatusCode::CANCELLED);
  EXPECT_TRUE(server.Idle());
  EXPECT_EQ(OnlyCode(server), absl::StatusCode::kCancelled);
  EXPECT_EQ(server.Metric(R"(certiq_jobs{state="running"})"), 0);
}

INSTANTIATE_TEST_SUITE_P(Phases, QuantizeCancelPhaseTest,
                         ::testing::Values(v1::PHASE_FACTOR, v1::PHASE_REFERENCE, v1::PHASE_ROUND));

TEST(QuantizeCancelTest, WhileSending) {
  TestServer server;
  Call call(server);
  call.SendAll(QuantizeRequestsFor(MakeRandomLayer(16384, 256, 64), 4096));
  call.Close();
  ASSERT_TRUE(TestServer::Eventually([&] {
    return server.Metric(R"(certiq_jobs_total{method="optq",outcome="succeeded"})") == 1;
  }));
  call.Cancel();
  EXPECT_EQ(call.Finish().status.error_code(), StatusCode::CANCELLED);
  EXPECT_TRUE(server.Idle());
  EXPECT_EQ(OnlyCode(server), absl::StatusCode::kCancelled);
}

TEST(QuantizeCancelTest, ConnectionGone) {
  TestServer server;
  {
    Call call(server);
    call.Send(HeaderFor(MakeRandomLayer(8, 16, 32)));
    ASSERT_TRUE(call.ReadUntil(v1::PHASE_RECEIVE));
    call.Cancel();
    call.Finish();
  }
  EXPECT_TRUE(server.Idle());
}

TEST(QuantizeCancelTest, DeadlineWhileComputing) {
  TestServer server;
  Call call(server, std::chrono::milliseconds(600));
  call.SendAll(QuantizeRequestsFor(MakeRandomLayer(4096, 3072, 64), 512));
  EXPECT_EQ(call.Finish().status.error_code(), StatusCode::DEADLINE_EXCEEDED);
  EXPECT_TRUE(server.Idle());
  EXPECT_EQ(OnlyCode(server), absl::StatusCode::kDeadlineExceeded);
}

TEST(QuantizeCancelTest, DeadlineWhileIdle) {
  TestServer server;
  Call call(server, std::chrono::milliseconds(100));
  call.Send(HeaderFor(MakeRandomLayer(8, 16, 32)));
  v1::QuantizeResponse response;
  while (call.Read(response)) {
  }
  EXPECT_EQ(call.Finish().status.error_code(), StatusCode::DEADLINE_EXCEEDED);
  EXPECT_TRUE(server.Idle());
  EXPECT_EQ(OnlyCode(server), absl::StatusCode::kDeadlineExceeded);
}

}  // namespace
}  // namespace certiq::testing
