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
#include "base/address.h"
#include "base/listening_socket.h"
#include "base/mutex.h"
#include "base/status.h"
#include "base/status_macros.h"
#include "contract/limits.h"
#include "rpc/calls/call_budget.h"
#include "rpc/calls/call_registry.h"
#include "rpc/calls/router.h"
#include "rpc/services/services.h"
#include "rpc/transport/probe.h"
#include "runtime/periodic_task.h"

namespace certiq::server {
namespace {

using Clock = std::chrono::steady_clock;

// What a call may take to end once it was told to; after that its connection
// is cut. A block of work is a matter of milliseconds; a reader that does not read takes forever.
constexpr std::chrono::milliseconds kGrace{1000};

// gRPC's own buffers, which hold messages until they are whole: only of callers whom the server
// knows. Over the quota, gRPC shrinks windows and drops connections.
constexpr int64_t kMinTransportBytes = int64_t{128} << 20;
constexpr int64_t kMaxTransportBytes = int64_t{1} << 30;

// What requests and answers of short calls may hold.
constexpr int64_t kCallBytes = int64_t{48} << 20;

// Threads of health checks and reflection, the only calls that wait on one.
constexpr int kSyncThreads = 8;

// Between two looks at every call and at the files that it relies on.
constexpr std::chrono::milliseconds kSuperviseInterval{1000};

// Between two probes of the own listener, how long one may take, and how many in a row must fail.
constexpr std::chrono::milliseconds kProbeInterval{5000};
constexpr std::chrono::milliseconds kProbeLimit{5000};
constexpr int kProbeFailures = 2;

// gRPC reads the file of authorities every second: what it has read of a bad one is gone after so
// long.
constexpr std::chrono::seconds kAuthoritiesSettle{3};

void Configure(grpc::ServerBuilder& builder, const ByteBudget& budget) {
  builder.SetMaxReceiveMessageSize(static_cast<int>(kMaxMessageBytes));
  // The limit above counts bytes on the wire: compressed, 16 MiB could become
  // gigabytes. Activations hardly compress anyway; such messages get UNIMPLEMENTED.
  builder.SetCompressionAlgorithmSupportStatus(GRPC_COMPRESS_DEFLATE, false);
  builder.SetCompressionAlgorithmSupportStatus(GRPC_COMPRESS_GZIP, false);
  builder.SetResourceQuota(grpc::ResourceQuota("certiq")
                               .Resize(static_cast<size_t>(std::clamp(
                                   budget.capacity() / 8, kMinTransportBytes, kMaxTransportBytes)))
                               .SetMaxThreads(kSyncThreads));
  // A window of fixed size. Measured windows shrink under memory pressure, and gRPC 1.51 resets a
  // stream whose sender has not heard of it yet ("Stream removed"). 1 MiB keeps 1 GB/s going at a
  // round trip of a millisecond; a message that is waited for gets a window of its own size.
  builder.AddChannelArgument(GRPC_ARG_HTTP2_BDP_PROBE, 0);
  builder.AddChannelArgument(GRPC_ARG_HTTP2_STREAM_LOOKAHEAD_BYTES, 1 << 20);
  // Frames of 16 KiB, the default, cost more than the bytes in them.
  builder.AddChannelArgument(GRPC_ARG_HTTP2_MAX_FRAME_SIZE, 1 << 20);
  builder.AddChannelArgument(GRPC_ARG_MAX_CONCURRENT_STREAMS, 1024);
  // A peer that says nothing, or has nothing to say any more, gives its place to others.
  builder.AddChannelArgument(GRPC_ARG_SERVER_HANDSHAKE_TIMEOUT_MS, 20'000);
  builder.AddChannelArgument(GRPC_ARG_MAX_CONNECTION_IDLE_MS, 900'000);
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
                    .budget = budget,
                    .log = options.log,
                    .auth = options.auth == nullptr ? &everyone : options.auth},
        router(environment),
        supervision([this] { registry.SuperviseAll(Clock::now()); }, kSuperviseInterval, [] {}),
        watchdog([this] { LookAtListener(); }, kProbeInterval, [] {}) {
    AddQuantizationMethods(router);
    AddCalibrationMethods(router);
    AddJobMethods(router);
  }

  // Stops taking calls.
  void Close() {
    open = false;
    options.backend->StopStarting();
    SayWhetherServing();
  }

  void SayWhetherServing() { grpc->GetHealthCheckService()->SetServingStatus(open && answers); }

  // gRPC would let everyone in where the file of authorities is empty: it is looked at for each
  // connection, and nobody is let in until gRPC has forgotten what it read of a bad one.
  bool LetsIn() {
    if (options.tls.client_ca.empty()) return true;
    const base::MutexLock lock(mu);
    const Clock::time_point now = Clock::now();
    if (const std::optional<FileStamp> stamp = StampOf(options.tls.client_ca); stamp != read) {
      read = stamp;
      const absl::Status found = CheckAuthorities(options.tls);
      if (!found.ok() && authorities_good && options.warn) {
        options.warn(absl::StrCat(found.message(), "; new connections are turned away"));
      }
      authorities_good = found.ok();
      if (!authorities_good) {
        closed_until = Clock::time_point::max();
      } else if (closed_until == Clock::time_point::max()) {
        closed_until = now + kAuthoritiesSettle;
      }
    }
    return now >= closed_until;
  }

  // As a client would come: what health answers over a connection that is there already says
  // nothing of the listener.
  void LookAtListener() {
    if (!open) return;
    const absl::Status found = server::ProbeListener(address, options.tls.enabled(), kProbeLimit,
                                                     [this](int port) { acceptor->Expect(port); });
    acceptor->Expect(0);
    if (!open) return;
    failures = found.ok() ? 0 : failures + 1;
    const bool now = failures < kProbeFailures;
    if (now == answers) return;
    answers = now;
    SayWhetherServing();
    if (!options.warn) return;
    options.warn(now ? "the listener answers again"
                     : absl::StrCat("the own listener does not answer: ", found.message()));
  }

  const Options options;
  Authenticator everyone;
  CallRegistry registry;
  CallBudget budget{kCallBytes};
  const CallEnvironment environment;
  Router router;
  // Where it listens.
  base::Address address;
  std::atomic<bool> open{true};
  // Whether the own listener answered lately.
  std::atomic<bool> answers{true};
  // The watchdog's.
  int failures = 0;
  base::Mutex mu;
  // The file of authorities as it was read last, what it was, and since when connections are let
  // in.
  std::optional<FileStamp> read ABSL_GUARDED_BY(mu);
  bool authorities_good ABSL_GUARDED_BY(mu) = true;
  Clock::time_point closed_until ABSL_GUARDED_BY(mu){};
  std::once_flag stopped;
  // What follows stops using the rest before the rest goes.
  std::unique_ptr<grpc::Server> grpc;
  std::unique_ptr<grpc::experimental::ExternalConnectionAcceptor> connections;
  std::unique_ptr<Acceptor> acceptor;
  PeriodicTask supervision;
  PeriodicTask watchdog;
};

Server::Server(std::unique_ptr<Impl> impl) : impl_(std::move(impl)) {}

Server::~Server() { Shutdown(); }

absl::StatusOr<std::unique_ptr<Server>> Server::Start(Options options) {
  ASSIGN_OR_RETURN(base::Address address, base::ParseAddress(options.listen));
  ASSIGN_OR_RETURN(const std::shared_ptr<grpc::ServerCredentials> credentials,
                   ServerCredentials(options.tls, options.warn));
  const bool tokens = options.auth != nullptr && options.auth->enabled();
  if (options.tls.enabled() && options.tls.client_ca.empty() && !tokens && options.warn) {
    options.warn(
        "--tls_cert without --token_file or --tls_client_ca: the way is encrypted, and everyone is "
        "let in");
  }
  if (!options.tls.enabled() && !base::IsLoopback(address)) {
    if (!options.allow_cleartext) {
      return absl::FailedPreconditionError(
          absl::StrCat(options.listen,
                       " is not a loopback address: it needs --tls_cert and --tls_key, or "
                       "--allow_cleartext for clear text beyond this machine"));
    }
    if (options.warn && tokens) {
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
  absl::StatusOr<base::ListeningSockets> sockets = base::Listen(address);
  if (!sockets.ok()) {
    return absl::Status(
        sockets.status().code(),
        absl::StrCat("cannot listen on ", impl->options.listen, ": ", sockets.status().message()));
  }
  impl->connections = builder.experimental().AddExternalConnectionAcceptor(
      grpc::ServerBuilder::experimental_type::ExternalConnectionType::FROM_FD, credentials);
  impl->router.Register(builder);
  impl->grpc = builder.BuildAndStart();
  if (impl->grpc == nullptr) return absl::InternalError("gRPC's server does not start");
  address.port = address.is_unix() ? address.port : sockets->port;
  impl->address = address;
  for (const RpcMethod& method : kRpcMethods) {
    impl->grpc->GetHealthCheckService()->SetServingStatus(method.service, true);
  }
  impl->acceptor = std::make_unique<Acceptor>(
      *std::move(sockets), impl->options.connections,
      [server = impl.get()] { return server->LetsIn(); },
      [connections = impl->connections.get()](int listener, int fd) {
        grpc::experimental::ExternalConnectionAcceptor::NewConnectionParameters connection;
        connection.listener_fd = listener;
        connection.fd = fd;
        connections->HandleNewConnection(&connection);
      },
      impl->options.warn);
  impl->supervision.Start();
  impl->watchdog.Start();
  return std::unique_ptr<Server>(new Server(std::move(impl)));
}

int Server::port() const { return impl_->acceptor->port(); }

absl::Status Server::health() const {
  if (!impl_->open) return absl::UnavailableError("draining");
  if (!impl_->answers) return absl::UnavailableError("the listener does not answer");
  return absl::OkStatus();
}

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
    impl_->supervision.Stop();
    impl_->watchdog.Stop();
    impl_->grpc->Shutdown(std::chrono::system_clock::now() + kGrace);
    // Every call is done for gRPC; the last OnDone may still be at its log line.
    impl_->registry.WaitEmpty();
  });
}

}  // namespace certiq::server
