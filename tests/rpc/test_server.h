// A whole server on a free port, and clients of it.

#ifndef CERTIQ_TESTS_RPC_TEST_SERVER_H_
#define CERTIQ_TESTS_RPC_TEST_SERVER_H_

#include <grpc/compression.h>
#include <grpcpp/channel.h>
#include <grpcpp/client_context.h>
#include <grpcpp/security/credentials.h>
#include <grpcpp/support/status.h>

#include <chrono>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "backend.h"
#include "certiq/v1/quantization_service.grpc.pb.h"
#include "certiq/v1/quantization_service.pb.h"
#include "google/rpc/error_details.pb.h"
#include "observability/http_server.h"
#include "observability/metrics.h"
#include "rpc/transport/server.h"
#include "runtime/byte_budget.h"
#include "runtime/worker_pool.h"
#include "support/gate.h"
#include "support/layers.h"

namespace certiq::testing {

// What main.cc wires, in one object.
class TestServer {
 public:
  struct Options {
    int workers = 2;
    int queue_limit = 16;
    int64_t budget = int64_t{4} << 30;
    std::string listen = "127.0.0.1:0";
    server::TlsFiles tls = {};
    server::Authenticator* auth = nullptr;
    // Empty: in memory.
    std::string data_dir = {};
  };
  TestServer() : TestServer(Options{}) {}
  explicit TestServer(const Options& options);
  // Expects that nothing is held any more.
  ~TestServer();

  // A connection of its own.
  std::unique_ptr<v1::QuantizationService::Stub> NewStub() const;
  std::shared_ptr<grpc::Channel> NewChannel() const;
  std::shared_ptr<grpc::Channel> NewChannel(
      const std::shared_ptr<grpc::ChannelCredentials>& credentials) const;

  // A series of /metrics, as "name{label=\"value\"}"; -1 if there is none.
  double Metric(const std::string& series) const;
  int http_port() const { return http_->port(); }
  // GET over real HTTP: the whole answer.
  std::string Http(const std::string& path) const;

  // Keeps a worker busy until the gate opens; returns when it does.
  void Block(Gate& gate);
  // Waits until `condition` holds; false if it never does. For states that nobody announces.
  static bool Eventually(const std::function<bool()>& condition);
  // Waits until no call has anything left.
  bool Idle();

  std::vector<server::CallSummary> finished();

  server::Metrics counters{{.version = "test", .isa = "test"}};
  const std::unique_ptr<server::Backend> backend;
  server::ByteBudget& budget;
  server::WorkerPool& pool;
  std::unique_ptr<server::Server> server;

 private:
  std::unique_ptr<server::HttpServer> http_;
  std::mutex mu_;
  std::vector<server::CallSummary> finished_;  // guarded by mu_
};

// A backend of two workers that keeps everything in memory.
std::unique_ptr<server::Backend> MakeBackend();

// A piece of the result, as it was framed.
struct ChunkFrame {
  int32_t tensor = 0;
  int64_t row_offset = 0;
  int64_t bytes = 0;
};

// What a call brought.
struct Outcome {
  grpc::Status status;
  std::vector<v1::Progress> progress;
  v1::ResultHeader header;
  std::map<int32_t, std::string> tensors;
  std::vector<ChunkFrame> chunks;
  v1::Certificate certificate;
};

// One call, step by step.
class Call {
 public:
  explicit Call(const TestServer& server,
                std::chrono::milliseconds timeout = std::chrono::milliseconds(kPatience));
  // False once the server ended the call.
  bool Send(const v1::QuantizeRequest& request) { return stream_->Write(request); }
  void SendAll(const std::vector<v1::QuantizeRequest>& requests);
  bool Read(v1::QuantizeResponse& response) { return stream_->Read(&response); }
  // Reads until a progress of this phase; false if the stream ends first.
  bool ReadUntil(v1::Phase phase);
  void Close() {
    if (!closed_) stream_->WritesDone();
    closed_ = true;
  }
  void Cancel() { context_.TryCancel(); }
  // Closes, reads everything, ends.
  Outcome Finish();

 private:
  bool closed_ = false;
  grpc::ClientContext context_;
  std::unique_ptr<v1::QuantizationService::Stub> stub_;
  std::unique_ptr<grpc::ClientReaderWriter<v1::QuantizeRequest, v1::QuantizeResponse>> stream_;
};

Outcome Quantize(const TestServer& server, const std::vector<v1::QuantizeRequest>& requests);

// Sends raw bytes as the messages of a method, "JobService/CreateJob", and half-closes; returns the
// status.
grpc::Status SendRaw(const TestServer& server, const std::string& method,
                     const std::vector<std::string>& messages,
                     grpc_compression_algorithm compression = GRPC_COMPRESS_NONE);

// The details of a status; empty messages where there are none.
struct Details {
  google::rpc::BadRequest bad_request;
  google::rpc::PreconditionFailure precondition;
  google::rpc::RetryInfo retry;

  // The field at fault.
  std::string field() const {
    return bad_request.field_violations_size() == 1 ? bad_request.field_violations(0).field()
                                                    : "(none)";
  }
};
Details DetailsOf(const grpc::Status& status);

}  // namespace certiq::testing

#endif  // CERTIQ_TESTS_RPC_TEST_SERVER_H_
