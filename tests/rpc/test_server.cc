#include "test_server.h"

#include <arpa/inet.h>
#include <grpcpp/completion_queue.h>
#include <grpcpp/create_channel.h>
#include <grpcpp/generic/generic_stub.h>
#include <grpcpp/security/credentials.h>
#include <gtest/gtest.h>
#include <sys/socket.h>
#include <unistd.h>

#include <array>
#include <sstream>
#include <thread>
#include <utility>

#include "absl/strings/str_cat.h"
#include "google/rpc/status.pb.h"
#include "store/storage.h"

namespace certiq::testing {

namespace {

std::unique_ptr<server::Backend> StartBackend(const TestServer::Options& options,
                                              server::Observer& observer) {
  absl::StatusOr<server::Storage> storage = server::OpenStorage(options.data_dir);
  EXPECT_TRUE(storage.ok()) << storage.status();
  auto backend = server::Backend::Start({.workers = options.workers,
                                         .queue_limit = options.queue_limit,
                                         .memory_bytes = options.budget,
                                         .cache_bytes = options.budget / 4,
                                         .commit_interval = std::chrono::milliseconds(10),
                                         .tick_interval = std::chrono::milliseconds(10),
                                         .observer = &observer},
                                        *std::move(storage));
  EXPECT_TRUE(backend.ok()) << backend.status();
  return *std::move(backend);
}

}  // namespace

std::unique_ptr<server::Backend> MakeBackend() {
  return StartBackend(TestServer::Options{}, server::IgnoreEvents());
}

TestServer::TestServer(const Options& options)
    : backend(StartBackend(options, counters)), budget(backend->memory()), pool(backend->pool()) {
  auto started = server::Server::Start({.listen = options.listen,
                                        .tls = options.tls,
                                        .backend = backend.get(),
                                        .calls = &counters,
                                        .log =
                                            [this](const server::CallSummary& summary) {
                                              const std::lock_guard lock(mu_);
                                              finished_.push_back(summary);
                                            },
                                        .auth = options.auth});
  EXPECT_TRUE(started.ok()) << started.status();
  server = *std::move(started);
  auto http = server::HttpServer::Start({.listen = "127.0.0.1:0",
                                         .metrics_text = [this] { return counters.Text(); },
                                         .health = [this] { return server->health(); }});
  EXPECT_TRUE(http.ok()) << http.status();
  http_ = *std::move(http);
}

TestServer::~TestServer() {
  server->Shutdown();
  EXPECT_EQ(budget.reserved(), 0);
  EXPECT_TRUE(pool.Drain(std::chrono::steady_clock::now() + kPatience));
}

std::shared_ptr<grpc::Channel> TestServer::NewChannel() const {
  return NewChannel(grpc::InsecureChannelCredentials());
}

std::shared_ptr<grpc::Channel> TestServer::NewChannel(
    const std::shared_ptr<grpc::ChannelCredentials>& credentials) const {
  grpc::ChannelArguments arguments;
  arguments.SetInt(GRPC_ARG_USE_LOCAL_SUBCHANNEL_POOL, 1);
  // A window that does not grow: what is not read waits in the server.
  arguments.SetInt(GRPC_ARG_HTTP2_BDP_PROBE, 0);
  return grpc::CreateCustomChannel(absl::StrCat("127.0.0.1:", server->port()), credentials,
                                   arguments);
}

std::unique_ptr<v1::QuantizationService::Stub> TestServer::NewStub() const {
  return v1::QuantizationService::NewStub(NewChannel());
}

std::string TestServer::Http(const std::string& path) const {
  const int fd = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
  sockaddr_in address = {};
  address.sin_family = AF_INET;
  address.sin_port = htons(static_cast<uint16_t>(http_->port()));
  address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
  std::string answer;
  if (connect(fd, reinterpret_cast<const sockaddr*>(&address), sizeof(address)) == 0) {
    const std::string request = absl::StrCat("GET ", path, " HTTP/1.1\r\nHost: test\r\n\r\n");
    if (send(fd, request.data(), request.size(), 0) == static_cast<ssize_t>(request.size())) {
      std::array<char, 4096> buffer;
      for (ssize_t n = 0; (n = recv(fd, buffer.data(), buffer.size(), 0)) > 0;) {
        answer.append(buffer.data(), static_cast<size_t>(n));
      }
    }
  }
  close(fd);
  return answer;
}

double TestServer::Metric(const std::string& series) const {
  std::istringstream lines(Http("/metrics"));
  for (std::string line; std::getline(lines, line);) {
    if (line.rfind(series + " ", 0) == 0) return std::stod(line.substr(series.size()));
  }
  return -1;
}

void TestServer::Block(Gate& gate) {
  const auto running = std::make_shared<Gate>();
  server::WorkerPool::Job job = MakeBlockingJob(pool, gate);
  job.run = [running, inner = job.run] {
    running->Open();
    return inner();
  };
  auto slot = pool.Admit();
  ASSERT_TRUE(slot.ok());
  ASSERT_TRUE(pool.Enqueue(*std::move(slot), std::move(job)).ok());
  ASSERT_TRUE(running->Wait());
}

bool TestServer::Eventually(const std::function<bool()>& condition) {
  const auto deadline = std::chrono::steady_clock::now() + kPatience;
  while (!condition()) {
    if (std::chrono::steady_clock::now() > deadline) return false;
    std::this_thread::yield();
  }
  return true;
}

bool TestServer::Idle() {
  return Eventually([this] { return budget.reserved() == 0; }) && Eventually([this] {
           return Metric("certiq_workers_busy") == 0 && Metric("certiq_queue_depth") == 0;
         });
}

std::vector<server::CallSummary> TestServer::finished() {
  const std::lock_guard lock(mu_);
  return finished_;
}

Call::Call(const TestServer& server, std::chrono::milliseconds timeout) : stub_(server.NewStub()) {
  context_.set_deadline(std::chrono::system_clock::now() + timeout);
  stream_ = stub_->Quantize(&context_);
}

void Call::SendAll(const std::vector<v1::QuantizeRequest>& requests) {
  for (const v1::QuantizeRequest& request : requests) {
    if (!Send(request)) return;
  }
}

bool Call::ReadUntil(v1::Phase phase) {
  v1::QuantizeResponse response;
  while (Read(response)) {
    if (response.progress().phase() == phase) return true;
  }
  return false;
}

Outcome Call::Finish() {
  Close();
  Outcome outcome;
  v1::QuantizeResponse response;
  while (Read(response)) {
    switch (response.payload_case()) {
      case v1::QuantizeResponse::kProgress:
        outcome.progress.push_back(response.progress());
        break;
      case v1::QuantizeResponse::kResult:
        outcome.header = response.result();
        break;
      case v1::QuantizeResponse::kChunk:
        outcome.tensors[response.chunk().tensor()] += response.chunk().data();
        outcome.chunks.push_back({.tensor = response.chunk().tensor(),
                                  .row_offset = response.chunk().row_offset(),
                                  .bytes = static_cast<int64_t>(response.chunk().data().size())});
        break;
      case v1::QuantizeResponse::kCertificate:
        outcome.certificate.MergeFrom(response.certificate());
        break;
      case v1::QuantizeResponse::PAYLOAD_NOT_SET:
        ADD_FAILURE() << "an empty response";
        break;
    }
  }
  outcome.status = stream_->Finish();
  return outcome;
}

grpc::Status SendRaw(const TestServer& server, const std::string& method,
                     const std::vector<std::string>& messages,
                     grpc_compression_algorithm compression) {
  grpc::GenericStub stub(server.NewChannel());
  grpc::ClientContext context;
  context.set_deadline(std::chrono::system_clock::now() + kPatience);
  context.set_compression_algorithm(compression);
  grpc::CompletionQueue queue;
  const auto step = [&queue] {
    void* tag = nullptr;
    bool ok = false;
    return queue.Next(&tag, &ok) && ok;
  };
  const auto call = stub.PrepareCall(&context, "/certiq.v1." + method, &queue);
  call->StartCall(nullptr);
  bool going = step();
  for (const std::string& message : messages) {
    grpc::Slice slice(message);
    call->Write(grpc::ByteBuffer(&slice, 1), nullptr);
    going = going && step();
    if (!going) break;
  }
  if (going) {
    call->WritesDone(nullptr);
    step();
  }
  grpc::ByteBuffer response;
  do {
    call->Read(&response, nullptr);
  } while (step());
  grpc::Status status;
  call->Finish(&status, nullptr);
  step();
  queue.Shutdown();
  while (step()) {
  }
  return status;
}

Outcome Quantize(const TestServer& server, const std::vector<v1::QuantizeRequest>& requests) {
  Call call(server);
  call.SendAll(requests);
  return call.Finish();
}

Details DetailsOf(const grpc::Status& status) {
  google::rpc::Status wire;
  EXPECT_TRUE(wire.ParseFromString(status.error_details()));
  Details details;
  for (const auto& any : wire.details()) {
    any.UnpackTo(&details.bad_request) || any.UnpackTo(&details.precondition) ||
        any.UnpackTo(&details.retry);
  }
  return details;
}

}  // namespace certiq::testing
