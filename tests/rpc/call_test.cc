// The machine of calls, in a server whose methods do what a test says.

#include "rpc/calls/call.h"

#include <grpcpp/create_channel.h>
#include <grpcpp/server.h>
#include <grpcpp/server_builder.h>
#include <gtest/gtest.h>

#include <atomic>
#include <functional>
#include <map>
#include <memory>
#include <new>
#include <optional>
#include <stdexcept>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "absl/cleanup/cleanup.h"
#include "absl/strings/str_cat.h"
#include "certificates.h"
#include "certiq/v1/calibration_service.grpc.pb.h"
#include "rpc/calls/router.h"
#include "test_server.h"

namespace certiq::testing {
namespace {

using grpc::StatusCode;
using server::Bytes;
using server::OnDrain;

constexpr char kService[] = "certiq.v1.CalibrationService";
constexpr server::RpcMethod kUnary{kService, "GetCalibration", server::CallShape::kUnary};
constexpr server::RpcMethod kClientStream{kService, "ImportStatistics",
                                          server::CallShape::kClientStream};
constexpr server::RpcMethod kServerStream{kService, "ExportStatistics",
                                          server::CallShape::kServerStream};
constexpr server::RpcMethod kBidi{kService, "Accumulate", server::CallShape::kBidiStream};
constexpr server::RpcMethod kMethods[] = {kUnary, kClientStream, kServerStream, kBidi};

bool Reads(const server::RpcMethod& method) { return StreamsRequests(method.shape); }
bool Writes(const server::RpcMethod& method) { return StreamsAnswers(method.shape); }

// The size of every message that a client sends here.
constexpr size_t kRequestBytes = 3;

enum class Say { kMessage, kNothingYet, kEnd };

// The part of a call that its hooks may use.
struct Handle {
  std::function<void(std::function<void(absl::StatusCode)>)> work_started;
  std::function<void(absl::Status)> work_ended;
  std::function<void()> changed;
  std::function<void(absl::Status)> fail;
  const engine::Cancellation* cancellation = nullptr;
  bool reads = false;
};

// The hooks of all calls, and counts over all of them. A hook is replaced only while no call runs.
struct Script {
  OnDrain on_drain = OnDrain::kIgnore;
  // Messages of a call are numbered from 0.
  std::function<absl::Status(Handle&, int)> take;
  std::function<absl::Status(Handle&)> end;
  // It is told how many messages the call produced before; null produces none.
  std::function<absl::StatusOr<Say>(Handle&, int)> produce;
  std::function<absl::Status(server::WorkerPool::Task&)> post;
  // Each message that is produced has about so many.
  size_t message_bytes = 0;

  std::atomic<int> taken{0};
  std::atomic<int> produced{0};
  std::atomic<int> dropped{0};
  std::atomic<int> gone{0};
  std::atomic<int> deleted{0};

  static const server::RpcMethod& method_of(const std::string& name) {
    for (const server::RpcMethod& method : kMethods) {
      if (name == method.method) return method;
    }
    return kUnary;
  }
};

class ScriptedCall final : public server::Call {
 public:
  ScriptedCall(server::CallStart start, Script* script)
      : Call(std::move(start), script->on_drain), script_(*script) {
    handle_ = {.work_started = [this](auto stop) { WorkStarted(std::move(stop)); },
               .work_ended = [this](absl::Status status) { WorkEnded(std::move(status)); },
               .changed = [this] { Changed(); },
               .fail = [this](absl::Status status) { Fail(std::move(status)); },
               .cancellation = &cancellation_,
               .reads = Reads(script->method_of(life_.summary.method))};
  }
  ~ScriptedCall() override {
    // A registry that does not wait for this would be seen to be too early.
    for (int i = 0; i < 1000; ++i) std::this_thread::yield();
    ++script_.deleted;
  }

 protected:
  absl::Status Take(const Bytes& message) override {
    EXPECT_FALSE(busy_.exchange(true));
    const absl::Cleanup over = [this] { busy_ = false; };
    EXPECT_EQ(message.Length(), kRequestBytes);
    ++script_.taken;
    return script_.take ? script_.take(handle_, taken_++) : absl::OkStatus();
  }
  absl::Status End() override {
    EXPECT_FALSE(busy_.exchange(true));
    const absl::Cleanup over = [this] { busy_ = false; };
    absl::Status status = script_.end ? script_.end(handle_) : absl::OkStatus();
    if (status.ok() && !Writes(script_.method_of(life_.summary.method))) {
      status = Respond(v1::Calibration());
    }
    return status;
  }
  absl::StatusOr<Produced> Produce(Bytes* outgoing) override {
    EXPECT_FALSE(producing_.exchange(true));
    const absl::Cleanup over = [this] { producing_ = false; };
    // Clients read another message, and skip this one's field as unknown or read it as theirs.
    v1::Calibration message;
    if (script_.message_bytes > 0) message.set_id(std::string(script_.message_bytes, 'x'));
    absl::StatusOr<Say> say = Say::kEnd;
    if (script_.produce) {
      say = script_.produce(handle_, produced_);
    } else if (!ended()) {
      say = Say::kNothingYet;
    }
    if (!say.ok()) return say.status();
    if (*say == Say::kEnd) return Produced::kEnd;
    if (*say == Say::kNothingYet) return Produced::kNothingYet;
    ++produced_;
    ++script_.produced;
    EXPECT_TRUE(server::Serialize(message, outgoing).ok());
    return Produced::kMessage;
  }
  absl::Status Post(server::WorkerPool::Task task) override {
    if (script_.post) {
      if (absl::Status status = script_.post(task); !status.ok()) return status;
    }
    return Call::Post(std::move(task));
  }
  void Drop() override {
    EXPECT_FALSE(busy_);
    EXPECT_FALSE(producing_);
    ++script_.dropped;
  }
  void Gone() override { ++script_.gone; }

 private:
  Script& script_;
  Handle handle_;
  std::atomic<bool> busy_{false};
  std::atomic<bool> producing_{false};
  int taken_ = 0;
  int produced_ = 0;
};

// It counts events by method.
class CountingObserver final : public server::CallObserver {
 public:
  void CallStarted(const server::RpcMethod& method) override { Count("started ", method); }
  void MessageReceived(const server::RpcMethod& method) override { Count("received ", method); }
  void MessageSent(const server::RpcMethod& method) override { Count("sent ", method); }
  void CallHandled(const server::RpcMethod& method, absl::StatusCode code,
                   double /*seconds*/) override {
    Count(absl::StrCat(absl::StatusCodeToString(code), " "), method);
  }
  int count(const std::string& what, const server::RpcMethod& method) {
    const std::lock_guard lock(mu_);
    return counts_[absl::StrCat(what, " ", method.method)];
  }

 private:
  void Count(const std::string& what, const server::RpcMethod& method) {
    const std::lock_guard lock(mu_);
    ++counts_[what + method.method];
  }
  std::mutex mu_;
  std::map<std::string, int> counts_;  // guarded by mu_
};

// A client's end of a call of any shape, which a test drives step by step.
class Client {
 public:
  Client(v1::CalibrationService::Stub& stub, const server::RpcMethod& method,
         std::chrono::milliseconds timeout = kPatience, const std::string& authorization = "")
      : stub_(stub), method_(method) {
    if (!authorization.empty()) context_.AddMetadata("authorization", authorization);
    context_.set_deadline(std::chrono::system_clock::now() + timeout);
    if (Is(kClientStream)) import_ = stub.ImportStatistics(&context_, &imported_);
    if (Is(kBidi)) accumulate_ = stub.Accumulate(&context_);
    if (Is(kUnary)) {
      unary_ = std::thread([this] { status_ = stub_.GetCalibration(&context_, Get(), &got_); });
    }
    if (Is(kServerStream)) {
      v1::ExportStatisticsRequest request;
      request.set_calibration_id("i");
      export_ = stub.ExportStatistics(&context_, request);
    }
  }
  ~Client() {
    if (over_) return;
    Cancel();
    Finish();
  }

  // It sends kRequestBytes; calls with one request have sent theirs.
  bool Send() {
    if (import_ != nullptr) {
      v1::ImportStatisticsRequest request;
      request.set_data("i");
      return import_->Write(request);
    }
    if (accumulate_ == nullptr) return true;
    v1::AccumulateRequest request;
    // AccumulateRequest has no such field, and keeps it.
    request.GetReflection()->MutableUnknownFields(&request)->AddLengthDelimited(15, "i");
    return accumulate_->Write(request);
  }
  void Close() {
    if (closed_) return;
    closed_ = true;
    if (import_ != nullptr) import_->WritesDone();
    if (accumulate_ != nullptr) accumulate_->WritesDone();
  }
  // False at the end.
  bool Read() {
    if (export_ != nullptr) {
      v1::ExportStatisticsResponse response;
      return export_->Read(&response);
    }
    v1::AccumulateResponse response;
    return accumulate_ != nullptr && accumulate_->Read(&response);
  }
  void Cancel() { context_.TryCancel(); }
  // It does not half-close.
  grpc::Status Finish() {
    over_ = true;
    while (Read()) ++read_;
    if (unary_.joinable()) unary_.join();
    if (import_ != nullptr) status_ = import_->Finish();
    if (export_ != nullptr) status_ = export_->Finish();
    if (accumulate_ != nullptr) status_ = accumulate_->Finish();
    return status_;
  }
  // The number of messages that Finish read.
  int read() const { return read_; }

 private:
  bool Is(const server::RpcMethod& method) const { return method.method == method_.method; }
  static v1::GetCalibrationRequest Get() {
    v1::GetCalibrationRequest request;
    request.set_calibration_id("i");
    return request;
  }

  v1::CalibrationService::Stub& stub_;
  const server::RpcMethod method_;
  grpc::ClientContext context_;
  std::thread unary_;
  v1::Calibration got_;
  v1::ImportStatisticsResponse imported_;
  std::unique_ptr<grpc::ClientWriter<v1::ImportStatisticsRequest>> import_;
  std::unique_ptr<grpc::ClientReader<v1::ExportStatisticsResponse>> export_;
  std::unique_ptr<grpc::ClientReaderWriter<v1::AccumulateRequest, v1::AccumulateResponse>>
      accumulate_;
  grpc::Status status_;
  bool closed_ = false;
  bool over_ = false;
  int read_ = 0;
};

class CallTest : public ::testing::Test {
 protected:
  CallTest() { Start(std::make_unique<server::Authenticator>()); }
  // Every call has ended once, dropped what it held once and left nothing.
  ~CallTest() override {
    stub_.reset();
    server_->Shutdown();
    registry_.WaitEmpty();
    EXPECT_EQ(script_.deleted, started());
    EXPECT_EQ(script_.dropped, started());
    EXPECT_EQ(script_.gone, started());
    EXPECT_EQ(logged().size(), static_cast<size_t>(started()));
  }

  void Start(std::unique_ptr<server::Authenticator> auth) {
    if (server_ != nullptr) server_->Shutdown();
    server_.reset();
    auth_ = std::move(auth);
    environment_.emplace(server::CallEnvironment{.environment = backend_->environment(),
                                                 .calibrations = backend_->calibrations(),
                                                 .jobs = backend_->jobs(),
                                                 .calls = observer_,
                                                 .registry = registry_,
                                                 .budget = budget_,
                                                 .log =
                                                     [this](const server::CallSummary& call) {
                                                       EXPECT_GE(call.seconds, 0);
                                                       const std::lock_guard lock(mu_);
                                                       logged_.push_back(call);
                                                     },
                                                 .auth = auth_.get()});
    router_ = std::make_unique<server::Router>(*environment_);
    for (const server::RpcMethod& method : kMethods) {
      router_->Add<ScriptedCall>(method, server::Scope::kRead, limits_, &script_);
    }
    grpc::ServerBuilder builder;
    int port = 0;
    builder.AddListeningPort("127.0.0.1:0", grpc::InsecureServerCredentials(), &port);
    builder.AddChannelArgument(GRPC_ARG_HTTP2_BDP_PROBE, 0);
    router_->Register(builder);
    server_ = builder.BuildAndStart();
    ASSERT_NE(server_, nullptr);
    grpc::ChannelArguments arguments;
    arguments.SetInt(GRPC_ARG_USE_LOCAL_SUBCHANNEL_POOL, 1);
    arguments.SetInt(GRPC_ARG_HTTP2_BDP_PROBE, 0);
    stub_ = v1::CalibrationService::NewStub(grpc::CreateCustomChannel(
        absl::StrCat("127.0.0.1:", port), grpc::InsecureChannelCredentials(), arguments));
  }

  int started() {
    int sum = 0;
    for (const auto& method : kMethods) sum += observer_.count("started", method);
    return sum;
  }
  std::vector<server::CallSummary> logged() {
    const std::lock_guard lock(mu_);
    return logged_;
  }
  // The code that the server logged of its only call so far.
  absl::StatusCode LoggedCode() {
    EXPECT_TRUE(TestServer::Eventually([&] { return logged().size() == 1; }));
    return logged().at(0).status.code();
  }
  // A whole call of one message.
  grpc::Status Run(const server::RpcMethod& method) {
    Client client(*stub_, method);
    client.Send();
    client.Close();
    return client.Finish();
  }
  static bool Eventually(const std::function<bool()>& condition) {
    return TestServer::Eventually(condition);
  }

  const std::unique_ptr<server::Backend> backend_ = MakeBackend();
  Script script_;
  CountingObserver observer_;
  server::CallRegistry registry_;
  server::CallBudget budget_{int64_t{64} << 20};
  server::CallLimits limits_;
  std::unique_ptr<server::Authenticator> auth_;
  std::mutex mu_;
  std::vector<server::CallSummary> logged_;  // guarded by mu_
  std::optional<server::CallEnvironment> environment_;
  std::unique_ptr<server::Router> router_;
  std::unique_ptr<grpc::Server> server_;
  std::unique_ptr<v1::CalibrationService::Stub> stub_;
};

// Each test runs for each shape.
class CallShapeTest : public CallTest, public ::testing::WithParamInterface<server::RpcMethod> {};

std::string NameOfShape(const ::testing::TestParamInfo<server::RpcMethod>& info) {
  return info.param.method;
}
INSTANTIATE_TEST_SUITE_P(Shapes, CallShapeTest, ::testing::ValuesIn(kMethods), NameOfShape);

TEST_P(CallShapeTest, EndsWellAndIsCounted) {
  script_.produce = [](Handle& /*call*/, int before) {
    return before < 3 ? Say::kMessage : Say::kEnd;
  };
  const server::RpcMethod method = GetParam();
  Client client(*stub_, method);
  const int sent = Reads(method) ? 4 : 1;
  for (int i = 0; i < sent; ++i) EXPECT_TRUE(client.Send());
  client.Close();
  EXPECT_TRUE(client.Finish().ok());
  EXPECT_EQ(client.read(), Writes(method) ? 3 : 0);
  EXPECT_EQ(LoggedCode(), absl::StatusCode::kOk);
  EXPECT_EQ(script_.taken, sent);
  EXPECT_EQ(observer_.count("received", method), sent);
  EXPECT_EQ(observer_.count("sent", method), Writes(method) ? 3 : 1);
  EXPECT_EQ(observer_.count("OK", method), 1);
  EXPECT_EQ(logged()[0].received_bytes, 3 * sent);
  EXPECT_STREQ(logged()[0].method, method.method);
}

TEST_P(CallShapeTest, ManyAtOnce) {
  script_.produce = [](Handle& /*call*/, int before) {
    return before < 3 ? Say::kMessage : Say::kEnd;
  };
  std::vector<std::thread> clients;
  std::atomic<int> ok{0};
  clients.reserve(8);
  for (int c = 0; c < 8; ++c) {
    clients.emplace_back([&] {
      for (int i = 0; i < 20; ++i) ok += Run(GetParam()).ok() ? 1 : 0;
    });
  }
  for (std::thread& client : clients) client.join();
  EXPECT_EQ(ok, 8 * 20);
}

TEST_P(CallShapeTest, RefusedAtTheStart) {
  const Folder folder;
  folder.Write("tokens", "alice-secret-token alice read\n");
  Warnings warnings;
  auto auth = server::Authenticator::Open(folder.Path("tokens"), warnings.Sink());
  ASSERT_TRUE(auth.ok()) << auth.status();
  Start(*std::move(auth));
  // So many of each shape.
  constexpr int kCalls = 20;
  for (int i = 0; i < kCalls; ++i) {
    // Streams are not closed by the client.
    Client client(*stub_, GetParam());
    const grpc::Status status = client.Finish();
    EXPECT_EQ(status.error_code(), StatusCode::UNAUTHENTICATED);
    EXPECT_NE(status.error_message().find("authorization: Bearer TOKEN"), std::string::npos);
  }
  EXPECT_TRUE(Eventually([&] { return logged().size() == kCalls; }));
  for (const server::CallSummary& call : logged()) {
    EXPECT_TRUE(absl::IsUnauthenticated(call.status));
    EXPECT_STREQ(call.method, GetParam().method);
    EXPECT_EQ(call.tenant, "");
  }
  EXPECT_EQ(script_.taken, 0);
  EXPECT_EQ(observer_.count("started", GetParam()), kCalls);
  EXPECT_EQ(observer_.count("UNAUTHENTICATED", GetParam()), kCalls);
}

// An exception in any hook that runs as a task is the call's end and nothing else's.
TEST_P(CallShapeTest, ExceptionsOfHooksBecomeStatuses) {
  enum class Where { kTake, kEnd, kProduce };
  struct Thrown {
    std::function<void()> raise;
    StatusCode code;
    const char* message;
  };
  const std::vector<Thrown> thrown = {
      {[] { throw std::runtime_error("a defect"); }, StatusCode::INTERNAL, "a defect"},
      {[] { throw std::bad_alloc(); }, StatusCode::RESOURCE_EXHAUSTED, "ran out of memory"},
      {[] { throw 7; }, StatusCode::INTERNAL, "unexpected exception"}};
  for (const Where where : {Where::kTake, Where::kEnd, Where::kProduce}) {
    if (where == Where::kProduce && !Writes(GetParam())) continue;
    for (const Thrown& each : thrown) {
      script_.take = [&](Handle& /*call*/, int /*number*/) {
        if (where == Where::kTake) each.raise();
        return absl::OkStatus();
      };
      script_.end = [&](Handle& /*call*/) {
        if (where == Where::kEnd) each.raise();
        return absl::OkStatus();
      };
      script_.produce = [&](Handle& /*call*/, int /*before*/) {
        if (where == Where::kProduce) each.raise();
        return Say::kEnd;
      };
      const grpc::Status status = Run(GetParam());
      EXPECT_EQ(status.error_code(), each.code) << status.error_message();
      EXPECT_NE(status.error_message().find(each.message), std::string::npos)
          << status.error_message();
      EXPECT_EQ(DetailsOf(status).retry.has_retry_delay(),
                each.code == StatusCode::RESOURCE_EXHAUSTED);
    }
  }
  script_.take = nullptr;
  script_.end = nullptr;
  script_.produce = nullptr;
  EXPECT_TRUE(Run(GetParam()).ok());
}

// Take and End are not run where Post fails or throws, and the call ends all the same.
TEST_P(CallShapeTest, TasksThatCannotBePosted) {
  script_.post = [](server::WorkerPool::Task& /*task*/) {
    return absl::UnavailableError("no more tasks");
  };
  EXPECT_EQ(Run(GetParam()).error_code(), StatusCode::UNAVAILABLE);
  script_.post = [](server::WorkerPool::Task& /*task*/) -> absl::Status { throw std::bad_alloc(); };
  EXPECT_EQ(Run(GetParam()).error_code(), StatusCode::RESOURCE_EXHAUSTED);
  EXPECT_EQ(script_.taken, 0);
  // The same at the end.
  script_.post = [&](server::WorkerPool::Task& /*task*/) -> absl::Status {
    if (script_.taken > 0) throw std::bad_alloc();
    return absl::OkStatus();
  };
  EXPECT_EQ(Run(GetParam()).error_code(), StatusCode::RESOURCE_EXHAUSTED);
  EXPECT_EQ(script_.taken, 1);
  script_.post = nullptr;
  EXPECT_TRUE(Run(GetParam()).ok());
}

TEST_P(CallShapeTest, APoolThatHasShutDown) {
  backend_->Hurry();
  EXPECT_EQ(Run(GetParam()).error_code(), StatusCode::UNAVAILABLE);
}

// A hook that runs is waited for, and its cancellation asks it to end.
TEST_P(CallShapeTest, CancelledWhileAHookRuns) {
  for (const bool in_take : {true, false}) {
    Gate reached;
    std::atomic<bool> stopped{false};
    const auto wait = [&](Handle& call) {
      reached.Open();
      EXPECT_TRUE(Eventually([&] { return call.cancellation->cancelled(); }));
      EXPECT_TRUE(absl::IsCancelled(call.cancellation->status()));
      EXPECT_EQ(script_.dropped, in_take ? 0 : 1);
      stopped = true;
      return absl::OkStatus();
    };
    script_.take = [&](Handle& call, int /*number*/) {
      return in_take ? wait(call) : absl::OkStatus();
    };
    script_.end = [&](Handle& call) { return in_take ? absl::OkStatus() : wait(call); };
    Client client(*stub_, GetParam());
    client.Send();
    if (!in_take) client.Close();
    ASSERT_TRUE(reached.Wait());
    client.Cancel();
    EXPECT_EQ(client.Finish().error_code(), StatusCode::CANCELLED);
    EXPECT_TRUE(Eventually([&] { return script_.deleted == (in_take ? 1 : 2); }));
    EXPECT_TRUE(stopped);
  }
  for (const server::CallSummary& call : logged()) EXPECT_TRUE(absl::IsCancelled(call.status));
}

// Work that goes on after End is told to stop, and waited for.
TEST_P(CallShapeTest, CancelledWhileWorkGoesOn) {
  Gate working;
  Gate stopping;
  std::atomic<int> reason{0};
  Handle* call = nullptr;
  script_.end = [&](Handle& handle) {
    call = &handle;
    handle.work_started([&](absl::StatusCode code) {
      reason = static_cast<int>(code);
      stopping.Open();
    });
    working.Open();
    return absl::OkStatus();
  };
  Client client(*stub_, GetParam());
  client.Send();
  client.Close();
  ASSERT_TRUE(working.Wait());
  client.Cancel();
  ASSERT_TRUE(stopping.Wait());
  EXPECT_EQ(client.Finish().error_code(), StatusCode::CANCELLED);
  EXPECT_EQ(reason, static_cast<int>(absl::StatusCode::kCancelled));
  EXPECT_EQ(script_.dropped, 0);
  call->work_ended(absl::OkStatus());
  EXPECT_EQ(LoggedCode(), absl::StatusCode::kCancelled);
}

TEST_P(CallShapeTest, TheDeadlineIsTheReasonForWork) {
  std::atomic<int> reason{0};
  script_.end = [&](Handle& call) {
    call.work_started([&reason, &call](absl::StatusCode code) {
      // Ended from within, as a run that waits is.
      if (reason.exchange(static_cast<int>(code)) == 0) call.work_ended(absl::OkStatus());
    });
    return absl::OkStatus();
  };
  Client client(*stub_, GetParam(), std::chrono::milliseconds(200));
  client.Send();
  client.Close();
  EXPECT_EQ(client.Finish().error_code(), StatusCode::DEADLINE_EXCEEDED);
  EXPECT_EQ(LoggedCode(), absl::StatusCode::kDeadlineExceeded);
  EXPECT_EQ(reason, static_cast<int>(absl::StatusCode::kDeadlineExceeded));
}

TEST_P(CallShapeTest, WorkMayEndBeforeEndReturnsAndFail) {
  script_.end = [&](Handle& call) {
    call.work_started([](absl::StatusCode /*reason*/) { ADD_FAILURE() << "it has ended"; });
    call.work_ended(absl::OkStatus());
    return absl::OkStatus();
  };
  EXPECT_TRUE(Run(GetParam()).ok());
  script_.end = [&](Handle& call) {
    call.work_started([](absl::StatusCode /*reason*/) {});
    call.work_ended(absl::DataLossError("gone"));
    return absl::OkStatus();
  };
  EXPECT_EQ(Run(GetParam()).error_code(), StatusCode::DATA_LOSS);
  // From another thread, at about the same time as End returns.
  for (int i = 0; i < 50; ++i) {
    std::thread work;
    script_.end = [&](Handle& call) {
      call.work_started([](absl::StatusCode /*reason*/) {});
      work = std::thread([&call] { call.work_ended(absl::OkStatus()); });
      return absl::OkStatus();
    };
    EXPECT_TRUE(Run(GetParam()).ok());
    work.join();
  }
}

TEST_P(CallShapeTest, TheFirstFailureCounts) {
  script_.take = [](Handle& call, int /*number*/) {
    call.fail(absl::AbortedError("first"));
    call.fail(absl::DataLossError("second"));
    return absl::InternalError("third");
  };
  const grpc::Status status = Run(GetParam());
  EXPECT_EQ(status.error_code(), StatusCode::ABORTED);
  EXPECT_EQ(status.error_message(), "first");
}

// A drain ends calls by their kind, and by whether their first message was taken.
TEST_P(CallShapeTest, Drain) {
  const absl::Status reason = base::DrainingError();
  for (const OnDrain on_drain : {OnDrain::kIgnore, OnDrain::kRefuse, OnDrain::kEnd}) {
    for (const bool started : {false, true}) {
      script_.on_drain = on_drain;
      const int before = script_.taken;
      Gate reached;
      Gate drained;
      // The call waits inside Take or, where that is over, inside End.
      const auto wait = [&] {
        reached.Open();
        EXPECT_TRUE(drained.Wait());
        return absl::OkStatus();
      };
      script_.take = [&](Handle& /*call*/, int /*number*/) {
        return started ? absl::OkStatus() : wait();
      };
      script_.end = [&](Handle& /*call*/) { return started ? wait() : absl::OkStatus(); };
      Client client(*stub_, GetParam());
      client.Send();
      client.Close();
      ASSERT_TRUE(reached.Wait());
      registry_.AbortAll(reason, /*only_waiting=*/true);
      drained.Open();
      const grpc::Status status = client.Finish();
      EXPECT_EQ(script_.taken, before + 1);
      const bool goes_on =
          on_drain == OnDrain::kIgnore || (on_drain == OnDrain::kRefuse && started);
      EXPECT_EQ(status.error_code(), goes_on ? StatusCode::OK : StatusCode::UNAVAILABLE);
      EXPECT_EQ(DetailsOf(status).retry.has_retry_delay(), !goes_on);
      EXPECT_TRUE(registry_.WaitEmptyUntil(std::chrono::steady_clock::now() + kPatience));
    }
  }
}

TEST_P(CallShapeTest, CallsThatComeWhileDraining) {
  backend_->StopStarting();
  for (const OnDrain on_drain : {OnDrain::kIgnore, OnDrain::kRefuse, OnDrain::kEnd}) {
    script_.on_drain = on_drain;
    const grpc::Status status = Run(GetParam());
    if (on_drain == OnDrain::kIgnore) {
      EXPECT_TRUE(status.ok());
      continue;
    }
    EXPECT_EQ(status.error_code(), StatusCode::UNAVAILABLE);
    EXPECT_EQ(DetailsOf(status).retry.retry_delay().seconds(), 1);
  }
  EXPECT_EQ(script_.taken, 1);
}

TEST_P(CallShapeTest, AbortedWhileWorkGoesOn) {
  Gate working;
  std::atomic<bool> stopped{false};
  script_.end = [&](Handle& call) {
    call.work_started([&](absl::StatusCode code) {
      EXPECT_EQ(code, absl::StatusCode::kUnavailable);
      if (!stopped.exchange(true)) call.work_ended(absl::OkStatus());
    });
    working.Open();
    return absl::OkStatus();
  };
  Client client(*stub_, GetParam());
  client.Send();
  client.Close();
  ASSERT_TRUE(working.Wait());
  registry_.AbortAll(absl::UnavailableError("over"), /*only_waiting=*/false);
  registry_.WaitEmpty();
  EXPECT_EQ(script_.deleted, 1);
  EXPECT_EQ(client.Finish().error_code(), StatusCode::UNAVAILABLE);
}

// A drain may meet a call at any moment, its construction included.
TEST_P(CallShapeTest, AbortsRaceWithCallsThatStart) {
  script_.on_drain = OnDrain::kEnd;
  std::atomic<bool> over{false};
  std::atomic<int> begun{0};
  std::thread drain([&] {
    for (int seen = 0; !over; std::this_thread::yield()) {
      if (begun == seen) continue;
      seen = begun;
      // Not without a pause: the registry's lock is not fair.
      for (int i = 0; i < 10; ++i) {
        registry_.AbortAll(base::DrainingError(), /*only_waiting=*/true);
        std::this_thread::yield();
      }
    }
  });
  std::vector<std::thread> clients;
  clients.reserve(4);
  for (int c = 0; c < 4; ++c) {
    clients.emplace_back([&] {
      for (int i = 0; i < 50; ++i) {
        ++begun;
        const StatusCode code = Run(GetParam()).error_code();
        EXPECT_TRUE(code == StatusCode::OK || code == StatusCode::UNAVAILABLE) << code;
      }
    });
  }
  for (std::thread& client : clients) client.join();
  over = true;
  drain.join();
}

TEST_F(CallTest, HooksOfOneCallRunInOrder) {
  std::atomic<int> next{0};
  script_.take = [&](Handle& /*call*/, int number) {
    EXPECT_EQ(next++, number);
    return absl::OkStatus();
  };
  script_.end = [&](Handle& /*call*/) {
    EXPECT_EQ(next, 100);
    return absl::OkStatus();
  };
  Client client(*stub_, kClientStream);
  for (int i = 0; i < 100; ++i) client.Send();
  client.Close();
  EXPECT_TRUE(client.Finish().ok());
  EXPECT_EQ(next, 100);
}

TEST_F(CallTest, AStreamWithoutAMessageHasAnEnd) {
  for (const server::RpcMethod& method : {kClientStream, kBidi}) {
    script_.end = [](Handle& /*call*/) { return absl::InvalidArgumentError("no header"); };
    Client client(*stub_, method);
    client.Close();
    EXPECT_EQ(client.Finish().error_message(), "no header");
  }
  EXPECT_EQ(script_.taken, 0);
}

TEST_F(CallTest, DrainOfCallsThatHaveSaidNothing) {
  for (const server::RpcMethod& method : {kClientStream, kBidi}) {
    for (const OnDrain on_drain : {OnDrain::kRefuse, OnDrain::kEnd}) {
      script_.on_drain = on_drain;
      const int before = started();
      Client client(*stub_, method);
      ASSERT_TRUE(Eventually([&] { return started() == before + 1; }));
      // It is counted a little before it can be told.
      EXPECT_TRUE(Eventually([&] {
        registry_.AbortAll(base::DrainingError(), /*only_waiting=*/true);
        return script_.dropped == before + 1;
      }));
      const grpc::Status status = client.Finish();
      EXPECT_EQ(status.error_code(), StatusCode::UNAVAILABLE);
      EXPECT_TRUE(DetailsOf(status).retry.has_retry_delay());
    }
  }
  EXPECT_EQ(script_.taken, 0);
}

TEST_F(CallTest, CancelledBeforeTheFirstMessage) {
  for (const server::RpcMethod& method : {kClientStream, kBidi}) {
    const int before = started();
    Client client(*stub_, method);
    ASSERT_TRUE(Eventually([&] { return started() == before + 1; }));
    client.Cancel();
    EXPECT_EQ(client.Finish().error_code(), StatusCode::CANCELLED);
    EXPECT_TRUE(Eventually([&] { return script_.deleted == started(); }));
  }
  EXPECT_EQ(script_.taken, 0);
  for (const server::CallSummary& call : logged()) EXPECT_TRUE(absl::IsCancelled(call.status));
}

// A client that falls silent after its header keeps nothing from others, and can still leave.
TEST_F(CallTest, SilenceAfterTheHeader) {
  for (const server::RpcMethod& method : {kClientStream, kBidi}) {
    const int before = script_.taken;
    Client client(*stub_, method);
    client.Send();
    ASSERT_TRUE(Eventually([&] { return script_.taken == before + 1; }));
    EXPECT_TRUE(Run(kUnary).ok());
    client.Cancel();
    EXPECT_EQ(client.Finish().error_code(), StatusCode::CANCELLED);
  }
}

// One message is held until the first was taken, then two are, however many the client sends.
TEST_F(CallTest, ReadsAreNotAhead) {
  for (const server::RpcMethod& method : {kClientStream, kBidi}) {
    Gate reached[2];
    Gate go_on[2];
    script_.take = [&](Handle& call, int number) {
      if (call.reads && number < 2) {
        reached[number].Open();
        EXPECT_TRUE(go_on[number].Wait());
      }
      return absl::OkStatus();
    };
    Client client(*stub_, method);
    for (int i = 0; i < 10; ++i) client.Send();
    client.Close();
    ASSERT_TRUE(reached[0].Wait());
    // After another call on the same connection, what was sent before has arrived.
    EXPECT_TRUE(Run(kUnary).ok());
    EXPECT_EQ(observer_.count("received", method), 1);
    go_on[0].Open();
    ASSERT_TRUE(reached[1].Wait());
    EXPECT_TRUE(Eventually([&] { return observer_.count("received", method) == 3; }));
    EXPECT_TRUE(Run(kUnary).ok());
    EXPECT_EQ(observer_.count("received", method), 3);
    go_on[1].Open();
    EXPECT_TRUE(client.Finish().ok());
    EXPECT_EQ(observer_.count("received", method), 10);
  }
}

// For a reader that does not read, the next message is made when the one before is out.
TEST_F(CallTest, SlowReader) {
  script_.message_bytes = size_t{1} << 20;
  for (const server::RpcMethod& method : {kServerStream, kBidi}) {
    const int sent_before = observer_.count("sent", method);
    script_.produce = [&](Handle& /*call*/, int before) {
      EXPECT_EQ(observer_.count("sent", method), sent_before + before);
      return before < 20 ? Say::kMessage : Say::kEnd;
    };
    Client client(*stub_, method);
    client.Send();
    client.Close();
    ASSERT_TRUE(Eventually([&] { return script_.produced > 0; }));
    // Others are served meanwhile.
    for (int i = 0; i < 20; ++i) EXPECT_TRUE(Run(kUnary).ok());
    EXPECT_LT(script_.produced, 20);
    EXPECT_TRUE(client.Finish().ok());
    EXPECT_EQ(client.read(), 20);
    EXPECT_EQ(script_.produced, 20);
    script_.produced = 0;
  }
}

TEST_F(CallTest, SlowReaderThatLeaves) {
  script_.message_bytes = size_t{1} << 20;
  script_.produce = [](Handle& /*call*/, int /*before*/) { return Say::kMessage; };
  for (const server::RpcMethod& method : {kServerStream, kBidi}) {
    const size_t before = logged().size();
    Client client(*stub_, method);
    client.Send();
    ASSERT_TRUE(client.Read());
    client.Cancel();
    EXPECT_EQ(client.Finish().error_code(), StatusCode::CANCELLED);
    EXPECT_TRUE(Eventually([&] { return logged().size() == before + 1; }));
    EXPECT_TRUE(absl::IsCancelled(logged().at(before).status));
  }
}

// The end of the server does not wait for a reader that does not read.
TEST_F(CallTest, SlowReaderAtTheEnd) {
  script_.message_bytes = size_t{1} << 20;
  script_.produce = [](Handle& /*call*/, int /*before*/) { return Say::kMessage; };
  Client exporting(*stub_, kServerStream);
  Client accumulating(*stub_, kBidi);
  accumulating.Send();
  ASSERT_TRUE(Eventually([&] { return script_.produced >= 2; }));
  registry_.AbortAll(absl::UnavailableError("over"), /*only_waiting=*/false);
  server_->Shutdown(std::chrono::system_clock::now() + std::chrono::milliseconds(100));
  registry_.WaitEmpty();
  for (const server::CallSummary& call : logged()) EXPECT_TRUE(absl::IsUnavailable(call.status));
  EXPECT_FALSE(exporting.Finish().ok());
  EXPECT_FALSE(accumulating.Finish().ok());
}

// A change that comes while Produce looks is not lost.
TEST_F(CallTest, ChangesAreNotMissed) {
  std::atomic<int> available{0};
  std::atomic<bool> last{false};
  Handle* call = nullptr;
  Gate working;
  script_.produce = [&](Handle& /*call*/, int before) {
    const bool end = last;
    if (before < available) return Say::kMessage;
    return end ? Say::kEnd : Say::kNothingYet;
  };
  script_.end = [&](Handle& handle) {
    handle.work_started([](absl::StatusCode /*reason*/) {});
    call = &handle;
    working.Open();
    return absl::OkStatus();
  };
  Client client(*stub_, kServerStream);
  ASSERT_TRUE(working.Wait());
  constexpr int kChanges = 300;
  for (int i = 0; i < kChanges; ++i) {
    ++available;
    call->changed();
    // One change, one message: without the next change nobody asks again.
    if (i % 3 == 0) {
      ASSERT_TRUE(client.Read());
    }
  }
  for (int i = 0; i < kChanges - (kChanges + 2) / 3; ++i) ASSERT_TRUE(client.Read());
  last = true;
  call->work_ended(absl::OkStatus());
  EXPECT_TRUE(client.Finish().ok());
  EXPECT_EQ(client.read(), 0);
}

// Messages go out while others are taken.
TEST_F(CallTest, ProduceRunsBesideTake) {
  Gate go_on;
  script_.take = [&](Handle& /*call*/, int number) {
    if (number == 1) {
      EXPECT_TRUE(go_on.Wait());
    }
    return absl::OkStatus();
  };
  script_.produce = [](Handle& /*call*/, int before) {
    return before < 5 ? Say::kMessage : Say::kEnd;
  };
  Client client(*stub_, kBidi);
  client.Send();
  client.Send();
  for (int i = 0; i < 5; ++i) EXPECT_TRUE(client.Read());
  go_on.Open();
  client.Close();
  EXPECT_TRUE(client.Finish().ok());
}

// A failure discards what waits.
TEST_F(CallTest, NothingIsTakenAfterAFailure) {
  for (const server::RpcMethod& method : {kClientStream, kBidi}) {
    script_.taken = 0;
    script_.take = [](Handle& /*call*/, int number) {
      return number == 1 ? absl::InvalidArgumentError("no") : absl::OkStatus();
    };
    Client client(*stub_, method);
    for (int i = 0; i < 100 && client.Send(); ++i) {
    }
    client.Close();
    EXPECT_EQ(client.Finish().error_code(), StatusCode::INVALID_ARGUMENT);
    EXPECT_EQ(script_.taken, 2);
  }
}

// Nothing of a message is read before its caller is known.
TEST_P(CallShapeTest, AStrangersMessageIsNotRead) {
  const Folder folder;
  folder.Write("tokens", "alice-secret-token alice read\n");
  Warnings warnings;
  auto auth = server::Authenticator::Open(folder.Path("tokens"), warnings.Sink());
  ASSERT_TRUE(auth.ok()) << auth.status();
  Start(*std::move(auth));
  EXPECT_EQ(Run(GetParam()).error_code(), StatusCode::UNAUTHENTICATED);
  EXPECT_TRUE(Eventually([&] { return logged().size() == 1; }));
  EXPECT_EQ(observer_.count("received", GetParam()), 0);
  EXPECT_EQ(logged()[0].received_bytes, 0);
}

TEST_P(CallShapeTest, AMessageMayBeTooLong) {
  limits_.message_bytes = static_cast<int64_t>(kRequestBytes);
  Start(std::make_unique<server::Authenticator>());
  EXPECT_TRUE(Run(GetParam()).ok());
  limits_.message_bytes = static_cast<int64_t>(kRequestBytes) - 1;
  Start(std::make_unique<server::Authenticator>());
  const grpc::Status status = Run(GetParam());
  EXPECT_EQ(status.error_code(), StatusCode::INVALID_ARGUMENT);
  EXPECT_EQ(DetailsOf(status).field(), "payload");
  EXPECT_EQ(script_.taken, 1);
}

// What a call holds is charged, and given back before its client hears the end.
TEST_P(CallShapeTest, WhatIsHeldIsCharged) {
  server::ByteBudget& memory = backend_->memory();
  limits_.held_bytes = memory.capacity() + 1;
  if (!Writes(GetParam())) limits_.held_bytes = (int64_t{64} << 20) + 1;
  Start(std::make_unique<server::Authenticator>());
  EXPECT_EQ(Run(GetParam()).error_code(), StatusCode::RESOURCE_EXHAUSTED);
  EXPECT_EQ(script_.taken, 0);
  limits_.held_bytes = int64_t{1} << 20;
  Start(std::make_unique<server::Authenticator>());
  std::atomic<int64_t> reserved{0};
  script_.take = [&](Handle& /*call*/, int /*number*/) {
    reserved = memory.reserved();
    return absl::OkStatus();
  };
  for (int i = 0; i < 100; ++i) {
    EXPECT_TRUE(Run(GetParam()).ok());
    EXPECT_EQ(memory.reserved(), 0);
  }
  EXPECT_EQ(reserved, Writes(GetParam()) ? limits_.held_bytes : 0);
}

// A call ends soon after its token was taken back, whatever it is at.
TEST_P(CallShapeTest, RevokedTokensEndOpenCalls) {
  const Folder folder;
  folder.Write("tokens", "alice-secret-token alice read\nbob-secret-token bob read\n");
  Warnings warnings;
  auto auth = server::Authenticator::Open(folder.Path("tokens"), warnings.Sink(),
                                          std::chrono::milliseconds(0));
  ASSERT_TRUE(auth.ok()) << auth.status();
  Start(*std::move(auth));
  Gate working;
  script_.end = [&](Handle& call) {
    call.work_started([&call](absl::StatusCode /*reason*/) { call.work_ended(absl::OkStatus()); });
    working.Open();
    return absl::OkStatus();
  };
  Client client(*stub_, GetParam(), kPatience, "Bearer alice-secret-token");
  client.Send();
  client.Close();
  ASSERT_TRUE(working.Wait());
  registry_.SuperviseAll(std::chrono::steady_clock::now());
  EXPECT_TRUE(logged().empty());
  // Another tenant's token of the same text would not do either.
  folder.Write("tokens", "alice-secret-token mallory read\nbob-secret-token bob read\n");
  registry_.SuperviseAll(std::chrono::steady_clock::now());
  EXPECT_EQ(client.Finish().error_code(), StatusCode::UNAUTHENTICATED);
  EXPECT_EQ(LoggedCode(), absl::StatusCode::kUnauthenticated);
}

// Who says nothing is waited for as long as the method allows: the clock is the supervisor's.
TEST_F(CallTest, SilentClientsAreNotWaitedForForEver) {
  const auto now = std::chrono::steady_clock::now;
  for (const bool may_be_silent : {false, true}) {
    limits_.idle = may_be_silent ? std::chrono::milliseconds(0) : std::chrono::seconds(600);
    Start(std::make_unique<server::Authenticator>());
    for (const server::RpcMethod& method : {kClientStream, kBidi}) {
      for (const bool started : {false, true}) {
        const int calls = this->started();
        const int taken = script_.taken;
        Client client(*stub_, method);
        if (started) {
          client.Send();
          ASSERT_TRUE(Eventually([&] { return script_.taken == taken + 1; }));
        } else {
          ASSERT_TRUE(Eventually([&] { return this->started() == calls + 1; }));
        }
        // It is taken a little before it counts as taken.
        EXPECT_TRUE(Eventually([&] {
          registry_.SuperviseAll(now() + std::chrono::seconds(started && may_be_silent ? 0 : 601));
          return script_.dropped == calls + 1 || (started && may_be_silent);
        }));
        if (started && may_be_silent) {
          registry_.SuperviseAll(now() + std::chrono::hours(100));
          EXPECT_EQ(script_.dropped, calls);
          client.Close();
          EXPECT_TRUE(client.Finish().ok());
        } else {
          const grpc::Status status = client.Finish();
          EXPECT_EQ(status.error_code(), StatusCode::ABORTED) << status.error_message();
          EXPECT_TRUE(DetailsOf(status).retry.has_retry_delay());
        }
        EXPECT_TRUE(Eventually([&] { return script_.deleted == calls + 1; }));
      }
    }
  }
}

// An answer that nobody reads does not keep its call for ever.
TEST_F(CallTest, AnswersThatAreNotReadAreGivenUp) {
  script_.message_bytes = size_t{1} << 20;
  script_.produce = [](Handle& /*call*/, int before) {
    return before < 20 ? Say::kMessage : Say::kEnd;
  };
  for (const server::RpcMethod& method : {kServerStream, kBidi}) {
    const int deleted = script_.deleted;
    Client client(*stub_, method);
    client.Send();
    client.Close();
    ASSERT_TRUE(Eventually([&] { return script_.produced > 0; }));
    EXPECT_TRUE(Eventually([&] {
      registry_.SuperviseAll(std::chrono::steady_clock::now() + std::chrono::seconds(61));
      return script_.deleted == deleted + 1;
    }));
    EXPECT_FALSE(client.Finish().ok());
    EXPECT_TRUE(absl::IsAborted(logged().back().status)) << logged().back().status;
    script_.produced = 0;
  }
}

TEST_F(CallTest, MethodsThatAreNotOffered) {
  grpc::ClientContext context;
  context.set_deadline(std::chrono::system_clock::now() + kPatience);
  google::protobuf::Empty nothing;
  const grpc::Status status =
      stub_->DeleteCalibration(&context, v1::DeleteCalibrationRequest(), &nothing);
  EXPECT_EQ(status.error_code(), StatusCode::UNIMPLEMENTED);
}

}  // namespace
}  // namespace certiq::testing
