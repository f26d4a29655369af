#include "observability/http_server.h"

#include <CivetServer.h>
#include <netdb.h>
#include <sys/socket.h>
#include <unistd.h>

#include <chrono>
#include <cstring>
#include <future>
#include <string_view>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"

namespace certiq::server {
namespace {

constexpr char kTextType[] = "text/plain; charset=utf-8";
// The content type of the format that TextSerializer writes.
constexpr char kMetricsType[] = "text/plain; version=0.0.4; charset=utf-8";

void Answer(mg_connection* connection, const char* status, const char* type, std::string_view body,
            bool head) {
  const std::string header =
      absl::StrCat("HTTP/1.1 ", status, "\r\nContent-Type: ", type,
                   "\r\nContent-Length: ", body.size(), "\r\nConnection: close\r\n\r\n");
  mg_write(connection, header.data(), header.size());
  if (!head) mg_write(connection, body.data(), body.size());
}

// Civetweb takes numeric addresses only.
std::string ListeningPorts(const std::string& listen) {
  constexpr std::string_view kLocalhost = "localhost:";
  if (listen.rfind(kLocalhost, 0) == 0) return "127.0.0.1:" + listen.substr(kLocalhost.size());
  return listen;
}

bool LooksLikeAddress(const std::string& listen) {
  const size_t colon = listen.rfind(':');
  const std::string port = colon == std::string::npos ? listen : listen.substr(colon + 1);
  // Civetweb would take letters after the port as options, and a comma as a second address.
  return !port.empty() && port.size() <= 5 &&
         port.find_first_not_of("0123456789") == std::string::npos && std::stoi(port) <= 65535 &&
         listen.find(',') == std::string::npos;
}

// Opens a connection to the server and closes it.
void Connect(const std::string& host, int port) {
  addrinfo hints = {};
  hints.ai_socktype = SOCK_STREAM;
  addrinfo* found = nullptr;
  // Without a host, or with "any", the loopback address is dialled.
  const bool any = host.empty() || host == "0.0.0.0" || host == "::";
  const std::string service = std::to_string(port);
  if (host != "::") hints.ai_family = host.find(':') == std::string::npos ? AF_INET : AF_INET6;
  if (getaddrinfo(any ? nullptr : host.c_str(), service.c_str(), &hints, &found) != 0) return;
  const std::unique_ptr<addrinfo, decltype(&freeaddrinfo)> list(found, &freeaddrinfo);
  const int fd = socket(found->ai_family, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
  if (fd < 0) return;
  // A refused connection is fine: then the listener has ended.
  (void)connect(fd, found->ai_addr, found->ai_addrlen);
  close(fd);
}

// HOST of HOST:PORT, without brackets; empty where there is only a port.
std::string HostOf(const std::string& ports) {
  const size_t colon = ports.rfind(':');
  if (colon == std::string::npos) return "";
  std::string host = ports.substr(0, colon);
  if (host.size() >= 2 && host.front() == '[') host = host.substr(1, host.size() - 2);
  return host;
}

}  // namespace

struct HttpServer::Handler final : CivetHandler {
  explicit Handler(Options handler_options) : options(std::move(handler_options)) {}

  bool handleGet(CivetServer* /*server*/, mg_connection* connection) override {
    Serve(connection, /*head=*/false);
    return true;
  }
  bool handleHead(CivetServer* /*server*/, mg_connection* connection) override {
    Serve(connection, /*head=*/true);
    return true;
  }

  void Serve(mg_connection* connection, bool head) const {
    const mg_request_info* const request = mg_get_request_info(connection);
    const std::string_view path = request->local_uri == nullptr ? "" : request->local_uri;
    if (path == "/metrics") {
      Answer(connection, "200 OK", kMetricsType, options.metrics_text(), head);
    } else if (path == "/healthz") {
      const bool healthy = options.healthy();
      Answer(connection, healthy ? "200 OK" : "503 Service Unavailable", kTextType,
             healthy ? "ok\n" : "draining\n", head);
    } else {
      Answer(connection, "404 Not Found", kTextType, "/metrics or /healthz\n", head);
    }
  }

  const Options options;
};

struct HttpServer::Civet {
  explicit Civet(const std::vector<std::string>& options) : server(options) {}
  CivetServer server;
};

HttpServer::HttpServer(Options options) : handler_(std::make_unique<Handler>(std::move(options))) {}

HttpServer::~HttpServer() {
  // Civetweb's listener reads its stop flag every two seconds and after every connection.
  // Connections spare us the two seconds.
  const auto stopped = std::async(std::launch::async, [this] { civet_.reset(); });
  while (stopped.wait_for(std::chrono::milliseconds(10)) != std::future_status::ready) {
    if (port_ != 0) Connect(host_, port_);
  }
}

absl::StatusOr<std::unique_ptr<HttpServer>> HttpServer::Start(Options options) {
  const std::string listen = options.listen;
  if (!LooksLikeAddress(listen)) {
    return absl::InvalidArgumentError(
        absl::StrCat("expected HOST:PORT with a port of 0 to 65535, got \"", listen, "\""));
  }
  std::unique_ptr<HttpServer> server(new HttpServer(std::move(options)));
  // Three threads: for a scrape, a probe, and a client that hangs.
  const std::vector<std::string> settings = {"listening_ports",    ListeningPorts(listen),
                                             "num_threads",        "3",
                                             "request_timeout_ms", "5000",
                                             "enable_keep_alive",  "no"};
  try {
    server->civet_ = std::make_unique<Civet>(settings);
  } catch (const CivetException&) {
    return absl::UnavailableError(absl::StrCat("cannot listen on ", listen,
                                               ": the port is in use or the address is not "
                                               "one of this machine"));
  }
  server->civet_->server.addHandler("**", server->handler_.get());
  const std::vector<int> ports = server->civet_->server.getListeningPorts();
  if (ports.empty()) return absl::InternalError("the HTTP server reports no port");
  server->host_ = HostOf(ListeningPorts(listen));
  server->port_ = ports.front();
  return server;
}

}  // namespace certiq::server
