// /metrics and /healthz over HTTP, for Prometheus and for load balancers.

#ifndef CERTIQ_OBSERVABILITY_HTTP_SERVER_H_
#define CERTIQ_OBSERVABILITY_HTTP_SERVER_H_

#include <functional>
#include <memory>
#include <string>

#include "absl/status/statusor.h"

namespace certiq::server {

// Answers GET and HEAD of two paths; anything else is 404 (405 for other
// methods). Clear text: what it serves names no client and no layer. Thread-safe.
class HttpServer {
 public:
  struct Options {
    // HOST:PORT, [IPV6]:PORT or PORT; port 0 asks for a free one.
    std::string listen;
    // The body of /metrics. Called from the server's threads.
    std::function<std::string()> metrics_text;
    // Whether /healthz says 200 "ok" or 503 "draining".
    std::function<bool()> healthy;
  };

  // INVALID_ARGUMENT for an address that is none, UNAVAILABLE where it cannot listen.
  static absl::StatusOr<std::unique_ptr<HttpServer>> Start(Options options);
  ~HttpServer();
  HttpServer(const HttpServer&) = delete;
  HttpServer& operator=(const HttpServer&) = delete;

  // The port it listens on.
  int port() const { return port_; }

 private:
  struct Handler;
  struct Civet;
  explicit HttpServer(Options options);

  std::unique_ptr<Handler> handler_;
  // Stops before the handler goes.
  std::unique_ptr<Civet> civet_;
  std::string host_;
  int port_ = 0;
};

}  // namespace certiq::server

#endif  // CERTIQ_OBSERVABILITY_HTTP_SERVER_H_
