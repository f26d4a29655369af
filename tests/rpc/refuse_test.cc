// Refused calls of every shape that gRPC has.

#include "rpc/calls/refuse.h"

#include <grpcpp/create_channel.h>
#include <grpcpp/server.h>
#include <grpcpp/server_builder.h>
#include <gtest/gtest.h>

#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <utility>

#include "absl/strings/str_cat.h"
#include "certiq/v1/calibration_service.grpc.pb.h"
#include "test_server.h"

namespace certiq::testing {
namespace {

using server::Refuse;

constexpr server::RpcMethod kMethods[] = {{"s", "Get", "unary"},
                                          {"s", "Import", "client_stream"},
                                          {"s", "Export", "server_stream"},
                                          {"s", "Accumulate", "bidi_stream"}};
// Of each shape.
constexpr int kCalls = 20;

class CountingObserver final : public server::CallObserver {
 public:
  void CallStarted(const server::RpcMethod& method) override {
    const std::lock_guard lock(mu_);
    ++counts[absl::StrCat("started ", method.method)];
  }
  void CallHandled(const server::RpcMethod& method, absl::StatusCode code,
                   double /*seconds*/) override {
    const std::lock_guard lock(mu_);
    ++counts[absl::StrCat(absl::StatusCodeToString(code), " ", method.method)];
  }
  std::map<std::string, int> counts;  // read when nothing runs

 private:
  std::mutex mu_;
};

class RefusingService final : public v1::CalibrationService::CallbackService {
 public:
  explicit RefusingService(const server::CallEnvironment& environment) : env_(environment) {}

  grpc::ServerUnaryReactor* GetCalibration(grpc::CallbackServerContext* /*context*/,
                                           const v1::GetCalibrationRequest* /*request*/,
                                           v1::Calibration* /*response*/) override {
    return Refuse<grpc::ServerUnaryReactor>(env_, kMethods[0], status_);
  }
  grpc::ServerReadReactor<v1::ImportStatisticsRequest>* ImportStatistics(
      grpc::CallbackServerContext* /*context*/,
      v1::ImportStatisticsResponse* /*response*/) override {
    return Refuse<grpc::ServerReadReactor<v1::ImportStatisticsRequest>>(env_, kMethods[1], status_);
  }
  grpc::ServerWriteReactor<v1::ExportStatisticsResponse>* ExportStatistics(
      grpc::CallbackServerContext* /*context*/,
      const v1::ExportStatisticsRequest* /*request*/) override {
    return Refuse<grpc::ServerWriteReactor<v1::ExportStatisticsResponse>>(env_, kMethods[2],
                                                                          status_);
  }
  grpc::ServerBidiReactor<v1::AccumulateRequest, v1::AccumulateResponse>* Accumulate(
      grpc::CallbackServerContext* /*context*/) override {
    return Refuse<grpc::ServerBidiReactor<v1::AccumulateRequest, v1::AccumulateResponse>>(
        env_, kMethods[3], status_);
  }

 private:
  const server::CallEnvironment& env_;
  const absl::Status status_ = absl::UnauthenticatedError("who are you?");
};

TEST(RefuseTest, EveryShapeEndsWithTheStatusIsCountedAndLogged) {
  CountingObserver observer;
  server::CallRegistry registry;
  server::Authenticator auth;
  std::mutex mu;
  std::map<std::string, int> logged;
  const auto backend = MakeBackend();
  const server::CallEnvironment environment{.jobs = backend->environment(),
                                            .calibrations = backend->calibrations(),
                                            .manager = backend->manager(),
                                            .calls = observer,
                                            .registry = registry,
                                            .log =
                                                [&](const server::CallSummary& call) {
                                                  const std::lock_guard lock(mu);
                                                  ++logged[call.method];
                                                  EXPECT_TRUE(absl::IsUnauthenticated(call.status));
                                                  EXPECT_GE(call.seconds, 0);
                                                },
                                            .auth = &auth};
  RefusingService service(environment);
  grpc::ServerBuilder builder;
  int port = 0;
  builder.AddListeningPort("127.0.0.1:0", grpc::InsecureServerCredentials(), &port);
  builder.RegisterService(&service);
  const std::unique_ptr<grpc::Server> server = builder.BuildAndStart();
  ASSERT_NE(server, nullptr);
  const auto stub = v1::CalibrationService::NewStub(
      grpc::CreateChannel(absl::StrCat("127.0.0.1:", port), grpc::InsecureChannelCredentials()));

  for (int i = 0; i < kCalls; ++i) {
    grpc::ClientContext contexts[4];
    v1::Calibration calibration;
    v1::ImportStatisticsResponse imported;
    v1::ExportStatisticsResponse exported;
    const auto import = stub->ImportStatistics(&contexts[1], &imported);
    const auto accumulate = stub->Accumulate(&contexts[3]);
    const auto exporting = stub->ExportStatistics(&contexts[2], {});
    EXPECT_FALSE(exporting->Read(&exported));
    // Neither of the streams is closed by the client.
    for (const grpc::Status& status :
         {stub->GetCalibration(&contexts[0], {}, &calibration), import->Finish(),
          exporting->Finish(), accumulate->Finish()}) {
      EXPECT_EQ(status.error_code(), grpc::StatusCode::UNAUTHENTICATED);
      EXPECT_EQ(status.error_message(), "who are you?");
    }
  }
  registry.WaitEmpty();
  server->Shutdown();
  for (const server::RpcMethod& method : kMethods) {
    EXPECT_EQ(logged[method.method], kCalls) << method.method;
    EXPECT_EQ(observer.counts[absl::StrCat("started ", method.method)], kCalls);
    EXPECT_EQ(observer.counts[absl::StrCat("UNAUTHENTICATED ", method.method)], kCalls);
  }
}

}  // namespace
}  // namespace certiq::testing
