// The server's life: start, health, drain, shutdown.

#include "rpc/transport/server.h"

#include <gtest/gtest.h>

#include <future>
#include <string>
#include <vector>

#include "absl/strings/str_cat.h"
#include "base/listening_socket.h"
#include "rpc/transport/probe.h"
#include "support/requests.h"
#include "support/text.h"
#include "test_server.h"

namespace certiq::testing {
namespace {

using grpc::StatusCode;

std::string AddressOf(const TestServer& server) {
  return absl::StrCat("127.0.0.1:", server.server->port());
}

absl::Status StartOn(const std::string& listen, bool allow_cleartext = false) {
  const auto backend = MakeBackend();
  return server::Server::Start(
             {.listen = listen, .allow_cleartext = allow_cleartext, .backend = backend.get()})
      .status();
}

TEST(ServerTest, PortInUse) {
  const TestServer server;
  const absl::Status status = StartOn(AddressOf(server));
  EXPECT_TRUE(absl::IsUnavailable(status)) << status;
  EXPECT_CONTAINS(status.message(), AddressOf(server));
}

TEST(ServerTest, BadAddress) { EXPECT_TRUE(absl::IsInvalidArgument(StartOn("nonsense"))); }

TEST(ServerTest, ClearTextBeyondLoopbackHasToBeAllowed) {
  const absl::Status refused = StartOn("0.0.0.0:0");
  EXPECT_TRUE(absl::IsFailedPrecondition(refused));
  EXPECT_CONTAINS(refused.message(), "--allow_cleartext");
  EXPECT_TRUE(StartOn("0.0.0.0:0", true).ok());
}

TEST(ServerTest, ListensOnAUnixSocket) {
  const std::string path = absl::StrCat(::testing::TempDir(), "certiq-server-test.sock");
  const auto backend = MakeBackend();
  const auto server = server::Server::Start({.listen = "unix:" + path, .backend = backend.get()});
  ASSERT_TRUE(server.ok()) << server.status();
  EXPECT_EQ((*server)->port(), 0);
  EXPECT_TRUE(server::Probe("unix:" + path, {}, kPatience).ok());
}

TEST(ServerTest, ProbeTellsHowItIs) {
  TestServer server;
  const std::string address = AddressOf(server);
  EXPECT_TRUE(server::Probe(address, {}, kPatience).ok());
  EXPECT_CONTAINS(server.Http("/healthz"), "200 OK");
  server.server->Shutdown();
  EXPECT_FALSE(server::Probe(address, {}, std::chrono::milliseconds(500)).ok());
  EXPECT_CONTAINS(server.Http("/healthz"), "503");
  EXPECT_FALSE(server::Probe("nonsense", {}, std::chrono::milliseconds(500)).ok());
}

// The watchdog's probe: what takes a connection and says nothing is no listener of ours.
TEST(ServerTest, ProbeOfTheListener) {
  constexpr std::chrono::milliseconds kLimit{2000};
  const auto ignore = [](int /*port*/) {};
  TestServer server;
  base::Address address{"127.0.0.1", server.server->port()};
  int from = 0;
  EXPECT_TRUE(
      server::ProbeListener(address, false, kPatience, [&](int port) { from = port; }).ok());
  EXPECT_GT(from, 0);
  // A port that speaks HTTP/1, one that only accepts, one where nobody is.
  address.port = server.http_port();
  EXPECT_FALSE(server::ProbeListener(address, false, kLimit, ignore).ok());
  auto silent = base::Listen(*base::ParseAddress("127.0.0.1:0"));
  ASSERT_TRUE(silent.ok()) << silent.status();
  address.port = silent->port;
  for (const bool tls : {false, true}) {
    EXPECT_FALSE(server::ProbeListener(address, tls, std::chrono::milliseconds(200), ignore).ok());
  }
  silent->sockets.clear();
  EXPECT_FALSE(server::ProbeListener(address, false, kLimit, ignore).ok());
}

TEST(ServerTest, DrainFinishesWhatWasAdmitted) {
  TestServer server;
  const Layer layer = MakeRandomLayer(8, 16, 32);
  Call admitted(server);
  admitted.Send(HeaderFor(layer));
  ASSERT_TRUE(admitted.ReadUntil(v1::PHASE_RECEIVE));
  Call waiting(server);
  ASSERT_TRUE(TestServer::Eventually([&] {
    return server.Metric(
               "grpc_server_started_total{grpc_method=\"Quantize\",grpc_service=\"certiq.v1."
               "QuantizationService\",grpc_type=\"bidi_stream\"}") == 2;
  }));

  auto drained = std::async(std::launch::async, [&] { return server.server->Drain(kPatience); });
  ASSERT_TRUE(TestServer::Eventually([&] { return !server.server->health().ok(); }));
  // Health is still answered.
  EXPECT_CONTAINS(server::Probe(AddressOf(server), {}, kPatience).message(), "not serving");
  EXPECT_CONTAINS(server.Http("/healthz"), "draining");
  EXPECT_EQ(waiting.Finish().status.error_code(), StatusCode::UNAVAILABLE);
  EXPECT_EQ(Quantize(server, QuantizeRequestsFor(layer)).status.error_code(),
            StatusCode::UNAVAILABLE);
  admitted.Send(WeightChunk(layer, 0, 8));
  admitted.Send(ActivationChunk(layer, 0, 32));
  EXPECT_TRUE(admitted.Finish().status.ok());
  EXPECT_TRUE(drained.get());
}

TEST(ServerTest, DrainEndsAtItsLimit) {
  TestServer server;
  Call call(server);
  call.Send(HeaderFor(MakeRandomLayer(8, 16, 32)));
  ASSERT_TRUE(call.ReadUntil(v1::PHASE_RECEIVE));
  EXPECT_FALSE(server.server->Drain(std::chrono::milliseconds(10)));
  EXPECT_EQ(call.Finish().status.error_code(), StatusCode::UNAVAILABLE);
}

TEST(ServerTest, HurryEndsADrain) {
  TestServer server;
  Call call(server);
  call.Send(HeaderFor(MakeRandomLayer(8, 16, 32)));
  ASSERT_TRUE(call.ReadUntil(v1::PHASE_RECEIVE));
  auto drained = std::async(std::launch::async, [&] { return server.server->Drain(kPatience); });
  ASSERT_TRUE(TestServer::Eventually([&] { return !server.server->health().ok(); }));
  server.server->Hurry();
  EXPECT_FALSE(drained.get());
  EXPECT_EQ(call.Finish().status.error_code(), StatusCode::UNAVAILABLE);
}

TEST(ServerTest, ShutdownWhileBusy) {
  TestServer server;
  // One computes, one uploads, one has not begun, one does not read its result.
  Call computing(server);
  computing.SendAll(QuantizeRequestsFor(MakeRandomLayer(2048, 2048, 64), 512));
  computing.Close();
  ASSERT_TRUE(computing.ReadUntil(v1::PHASE_FACTOR));
  Call uploading(server);
  uploading.Send(HeaderFor(MakeRandomLayer(8, 16, 32)));
  ASSERT_TRUE(uploading.ReadUntil(v1::PHASE_RECEIVE));
  Call waiting(server);
  Call deaf(server);
  deaf.SendAll(QuantizeRequestsFor(MakeRandomLayer(16384, 256, 64), 4096));
  deaf.Close();

  const auto start = std::chrono::steady_clock::now();
  server.server->Shutdown();
  EXPECT_LT(std::chrono::steady_clock::now() - start, kPatience / 4);
  EXPECT_EQ(server.budget.reserved(), 0);
  for (Call* const call : {&computing, &uploading, &waiting, &deaf}) {
    EXPECT_FALSE(call->Finish().status.ok());
  }
}

TEST(ServerTest, ShutdownWithSlowReaderDoesNotHang) {
  TestServer server;
  Call deaf(server);
  deaf.SendAll(QuantizeRequestsFor(MakeRandomLayer(16384, 256, 64), 4096));
  deaf.Close();
  ASSERT_TRUE(TestServer::Eventually([&] {
    return server.Metric(R"(certiq_jobs_total{method="optq",outcome="succeeded"})") == 1;
  }));
  server.server->Shutdown();
  EXPECT_EQ(server.budget.reserved(), 0);
  EXPECT_FALSE(deaf.Finish().status.ok());
}

}  // namespace
}  // namespace certiq::testing
