// The gRPC server: what it listens on, how it starts and how it ends.

#ifndef CERTIQ_RPC_TRANSPORT_SERVER_H_
#define CERTIQ_RPC_TRANSPORT_SERVER_H_

#include <atomic>
#include <chrono>
#include <memory>
#include <string>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "backend.h"
#include "observability/call_observer.h"
#include "rpc/calls/call_summary.h"
#include "rpc/transport/acceptor.h"
#include "rpc/transport/auth.h"
#include "rpc/transport/credentials.h"
#include "rpc/transport/file.h"

namespace certiq::server {

// Serves certiq.v1, grpc.health.v1 and, unless switched off, reflection. Thread-safe.
class Server {
 public:
  struct Options {
    // HOST:PORT, [IPV6]:PORT or unix:PATH; port 0 asks for a free one.
    std::string listen = "127.0.0.1:0";
    // TLS where files are named.
    TlsFiles tls = {};
    // Serve clear text to other machines too.
    bool allow_cleartext = false;
    bool reflection = true;
    ConnectionLimits connections = {};
    // All of these outlive the server. The first is needed.
    Backend* backend = nullptr;
    CallObserver* calls = &IgnoreCalls();
    CallLog log = nullptr;
    // Null lets everyone in. Health and reflection ask nobody who they are.
    Authenticator* auth = nullptr;
    Warn warn = nullptr;
  };

  // INVALID_ARGUMENT for an address that is none, or, beginning with its flag, a file for TLS that
  // does not serve; FAILED_PRECONDITION for clear text beyond loopback, UNAVAILABLE where it cannot
  // listen.
  static absl::StatusOr<std::unique_ptr<Server>> Start(Options options);
  // Shuts down.
  ~Server();
  Server(const Server&) = delete;
  Server& operator=(const Server&) = delete;

  // The port it listens on; 0 for unix.
  int port() const;

  // UNAVAILABLE from the first Drain or Shutdown on, and while the own listener does not answer;
  // the message says which.
  absl::Status health() const;

  // Health answers NOT_SERVING, new calls and those not yet admitted get UNAVAILABLE; waits up to
  // `limit` for the others, then shuts down. True if none had to be cut off.
  bool Drain(std::chrono::milliseconds limit);
  // Ends a Drain that waits, by cutting calls off.
  void Hurry();
  // Ends every call with UNAVAILABLE and stops listening. Idempotent.
  void Shutdown();

 private:
  struct Impl;
  explicit Server(std::unique_ptr<Impl> impl);
  const std::unique_ptr<Impl> impl_;
};

}  // namespace certiq::server

#endif  // CERTIQ_RPC_TRANSPORT_SERVER_H_
