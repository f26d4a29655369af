#include "rpc/transport/server.h"

#include <grpc/compression.h>
#include <grpc/grpc.h>
#include <grpcpp/ext/proto_server_reflection_plugin.h>
#include <grpcpp/health_check_service_interface.h>
#include <grpcpp/resource_quota.h>
#include <grpcpp/server.h>
#include <grpcpp/server_builder.h>

#include <algorithm>
#include <mutex>
#include <utility>

#include "absl/strings/str_cat.h"
#include "base/status.h"
#include "base/status_macros.h"
#include "certiq/v1/calibration_service.grpc.pb.h"
#include "certiq/v1/job_service.grpc.pb.h"
#include "certiq/v1/quantization_service.grpc.pb.h"
#include "contract/limits.h"
#include "rpc/calls/call_registry.h"
#include "rpc/services/services.h"
#include "rpc/transport/address.h"

namespace certiq::server {
namespace {

using Clock = std::chrono::steady_clock;

// What a call may take to end once it was told to; after that its connection
// is cut. A block of work is a matter of milliseconds; a reader that does not read takes forever.
constexpr std::chrono::milliseconds kGrace{1000};

// gRPC's own buffers, which hold messages until they are whole: those of streams that have no
// header yet are not in the byte budget. Over the quota, gRPC shrinks windows and drops
// connections.
constexpr int64_t kMinTransportBytes = int64_t{128} << 20;
constexpr int64_t kMaxTransportBytes = int64_t{1} << 30;

void Configure(grpc::ServerBuilder& builder, const ByteBudget& budget) {
  builder.SetMaxReceiveMessageSize(static_cast<int>(kMaxMessageBytes));
  // The limit above counts bytes on the wire: compressed, 16 MiB could become
  // gigabytes. Activations hardly compress anyway; such messages get UNIMPLEMENTED.
  builder.SetCompressionAlgorithmSupportStatus(GRPC_COMPRESS_DEFLATE, false);
  builder.SetCompressionAlgorithmSupportStatus(GRPC_COMPRESS_GZIP, false);
  builder.SetResourceQuota(grpc::ResourceQuota("certiq").Resize(static_cast<size_t>(
      std::clamp(budget.capacity() / 8, kMinTransportBytes, kMaxTransportBytes))));
  // A window of fixed size. Measured windows shrink under memory pressure, and gRPC 1.51 resets a
  // stream whose sender has not heard of it yet ("Stream removed"). 1 MiB keeps 1 GB/s going at a
  // round trip of a millisecond; a message that is waited for gets a window of its own size.
  builder.AddChannelArgument(GRPC_ARG_HTTP2_BDP_PROBE, 0);
  builder.AddChannelArgument(GRPC_ARG_HTTP2_STREAM_LOOKAHEAD_BYTES, 1 << 20);
  // Frames of 16 KiB, the default, cost more than the bytes in them.
  builder.AddChannelArgument(GRPC_ARG_HTTP2_MAX_FRAME_SIZE, 1 << 20);
  // Two servers on one port would share its connections without a word.
  builder.AddChannelArgument(GRPC_ARG_ALLOW_REUSEPORT, 0);
  builder.AddChannelArgument(GRPC_ARG_MAX_CONCURRENT_STREAMS, 4096);
  // A peer that vanished gives back its place and its bytes after a minute or so.
  builder.AddChannelArgument(GRPC_ARG_KEEPALIVE_TIME_MS, 60'000);
  builder.AddChannelArgument(GRPC_ARG_KEEPALIVE_TIMEOUT_MS, 20'000);
  builder.AddChannelArgument(GRPC_ARG_KEEPALIVE_PERMIT_WITHOUT_CALLS, 1);
  // Clients may ping too, while a long job keeps their stream silent.
  builder.AddChannelArgument(GRPC_ARG_HTTP2_MIN_RECV_PING_INTERVAL_WITHOUT_DATA_MS, 10'000);
}

}  // namespace

struct Server::Impl {
  explicit Impl(Options server_options)
      : options(std::move(server_options)),
        environment{.environment = options.backend->environment(),
                    .calibrations = options.backend->calibrations(),
                    .jobs = options.backend->jobs(),
                    .calls = *options.calls,
                    .registry = registry,
                    .log = options.log,
                    .auth = options.auth == nullptr ? &everyone : options.auth},
        quantization(MakeQuantizationService(environment)),
        calibrations(MakeCalibrationService(environment)),
        jobs(MakeJobService(environment)) {}

  // Stops taking calls.
  void Close() {
    open = false;
    options.backend->StopStarting();
    grpc->GetHealthCheckService()->SetServingStatus(false);
  }

  const Options options;
  Authenticator everyone;
  CallRegistry registry;
  const CallEnvironment environment;
  const std::unique_ptr<grpc::Service> quantization;
  const std::unique_ptr<grpc::Service> calibrations;
  const std::unique_ptr<grpc::Service> jobs;
  int port = 0;
  std::atomic<bool> open{true};
  std::once_flag stopped;
  // Last: it stops using the rest before the rest goes.
  std::unique_ptr<grpc::Server> grpc;
};

Server::Server(std::unique_ptr<Impl> impl) : impl_(std::move(impl)) {}

Server::~Server() { Shutdown(); }

absl::StatusOr<std::unique_ptr<Server>> Server::Start(Options options) {
  ASSIGN_OR_RETURN(const Address address, ParseAddress(options.listen));
  ASSIGN_OR_RETURN(const std::shared_ptr<grpc::ServerCredentials> credentials,
                   ServerCredentials(options.tls, options.warn));
  if (!options.tls.enabled() && !IsLoopback(address)) {
    if (!options.allow_cleartext) {
      return absl::FailedPreconditionError(
          absl::StrCat(options.listen,
                       " is not a loopback address: it needs --tls_cert and --tls_key, or "
                       "--allow_cleartext for clear text beyond this machine"));
    }
    if (options.warn && options.auth != nullptr && options.auth->enabled()) {
      options.warn(absl::StrCat("--allow_cleartext: tokens travel to ", options.listen,
                                " in clear text, for everyone on the way to read"));
    }
  }
  // Both are switches of the process that the next builder obeys.
  grpc::EnableDefaultHealthCheckService(true);
  if (options.reflection) grpc::reflection::InitProtoReflectionServerBuilderPlugin();

  auto impl = std::make_unique<Impl>(std::move(options));
  grpc::ServerBuilder builder;
  Configure(builder, impl->options.backend->memory());
  int port = 0;
  builder.AddListeningPort(impl->options.listen, credentials, &port);
  builder.RegisterService(impl->quantization.get());
  builder.RegisterService(impl->calibrations.get());
  builder.RegisterService(impl->jobs.get());
  impl->grpc = builder.BuildAndStart();
  if (impl->grpc == nullptr) {
    return absl::UnavailableError(
        absl::StrCat("cannot listen on ", impl->options.listen,
                     ": the port is in use or the address is not one of this machine"));
  }
  impl->port = address.is_unix() ? 0 : port;
  for (const char* const name :
       {v1::QuantizationService::service_full_name(), v1::CalibrationService::service_full_name(),
        v1::JobService::service_full_name()}) {
    impl->grpc->GetHealthCheckService()->SetServingStatus(name, true);
  }
  return std::unique_ptr<Server>(new Server(std::move(impl)));
}

int Server::port() const { return impl_->port; }

bool Server::serving() const { return impl_->open; }

bool Server::Drain(std::chrono::milliseconds limit) {
  impl_->Close();
  impl_->registry.AbortAll(base::DrainingError(), /*only_waiting=*/true);
  const bool all_ended = impl_->registry.WaitEmptyUntil(Clock::now() + limit);
  Shutdown();
  return all_ended;
}

void Server::Hurry() { impl_->registry.Hurry(); }

void Server::Shutdown() {
  std::call_once(impl_->stopped, [this] {
    impl_->Close();
    impl_->registry.AbortAll(absl::UnavailableError("the server is shutting down"),
                             /*only_waiting=*/false);
    impl_->grpc->Shutdown(std::chrono::system_clock::now() + kGrace);
    // Every call is done for gRPC; the last OnDone may still be at its log line.
    impl_->registry.WaitEmpty();
  });
}

}  // namespace certiq::server
