// HTTP server of /metrics and /healthz.

#ifndef CERTIQ_OBSERVABILITY_HTTP_SERVER_H_
#define CERTIQ_OBSERVABILITY_HTTP_SERVER_H_

#include <functional>
#include <memory>
#include <string>

#include "absl/status/statusor.h"

namespace certiq::server {

// For Prometheus and load balancers. Answers GET and HEAD of the two paths; other paths are 404,
// other methods 405. It speaks clear text, since its answers name no client and no layer.
// Thread-safe.
class HttpServer {
 public:
  struct Options {
    // HOST:PORT, [IPV6]:PORT or PORT; port 0 asks for a free one.
    std::string listen;
    // The body of /metrics. Called from the server's threads.
    std::function<std::string()> metrics_text;
    // True for 200 "ok" of /healthz, false for 503 "draining". Called from the server's threads.
    std::function<bool()> healthy;
  };

  // INVALID_ARGUMENT for a malformed address, UNAVAILABLE if it cannot listen.
  static absl::StatusOr<std::unique_ptr<HttpServer>> Start(Options options);
  ~HttpServer();
  HttpServer(const HttpServer&) = delete;
  HttpServer& operator=(const HttpServer&) = delete;

  // The port it listens on, also where port 0 was asked for.
  int port() const { return port_; }

 private:
  struct Handler;
  struct Civet;
  explicit HttpServer(Options options);

  std::unique_ptr<Handler> handler_;
  // Destroyed before the handler, which its threads use.
  std::unique_ptr<Civet> civet_;
  std::string host_;
  int port_ = 0;
};

}  // namespace certiq::server

#endif  // CERTIQ_OBSERVABILITY_HTTP_SERVER_H_
