// HTTP server of /metrics and /healthz.

#ifndef CERTIQ_OBSERVABILITY_HTTP_SERVER_H_
#define CERTIQ_OBSERVABILITY_HTTP_SERVER_H_

#include <functional>
#include <memory>
#include <string>

#include "absl/status/status.h"
#include "absl/status/statusor.h"

namespace certiq::server {

// For Prometheus and load balancers. Answers GET and HEAD of the two paths; other paths are 404,
// other methods 405. It speaks clear text, since its answers name no client and no layer. One
// thread serves all connections without waiting for any; each is cut after ten seconds, however
// busy its client keeps it. Thread-safe.
class HttpServer {
 public:
  struct Options {
    // HOST:PORT or [IPV6]:PORT; port 0 asks for a free one.
    std::string listen;
    // The body of /metrics. Called from the server's thread.
    std::function<std::string()> metrics_text;
    // OK for 200 "ok" of /healthz, else 503 with the message. Called from the server's thread.
    std::function<absl::Status()> health;
  };

  // INVALID_ARGUMENT for a malformed address, UNAVAILABLE if it cannot listen.
  static absl::StatusOr<std::unique_ptr<HttpServer>> Start(Options options);
  ~HttpServer();
  HttpServer(const HttpServer&) = delete;
  HttpServer& operator=(const HttpServer&) = delete;

  // The port it listens on, also where port 0 was asked for.
  int port() const;

 private:
  struct Impl;
  explicit HttpServer(std::unique_ptr<Impl> impl);
  const std::unique_ptr<Impl> impl_;
};

}  // namespace certiq::server

#endif  // CERTIQ_OBSERVABILITY_HTTP_SERVER_H_
