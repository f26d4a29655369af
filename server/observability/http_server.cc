#include "observability/http_server.h"

#include <microhttpd.h>
#include <sys/socket.h>

#include <chrono>
#include <map>
#include <string_view>
#include <utility>
#include <vector>

#include "absl/base/thread_annotations.h"
#include "absl/strings/str_cat.h"
#include "base/address.h"
#include "base/exception_guard.h"
#include "base/listening_socket.h"
#include "base/mutex.h"
#include "base/status_macros.h"
#include "runtime/periodic_task.h"

namespace certiq::server {
namespace {

using Clock = std::chrono::steady_clock;

constexpr char kTextType[] = "text/plain; charset=utf-8";
// The content type of the format that TextSerializer writes.
constexpr char kMetricsType[] = "text/plain; version=0.0.4; charset=utf-8";

// Connections at a time, and of one address. A descriptor and some KiB each.
constexpr unsigned kMaxConnections = 256;
constexpr unsigned kMaxConnectionsOfOne = 128;
// What one may hold of a request's head.
constexpr size_t kConnectionBytes = size_t{16} << 10;
// A connection lives no longer, and is silent no longer.
constexpr std::chrono::seconds kLifetime{10};
constexpr unsigned kSilenceSeconds = 5;

MHD_Result Answer(MHD_Connection* connection, unsigned status, const char* type,
                  const std::string& body) {
  MHD_Response* const response = MHD_create_response_from_buffer(
      body.size(), const_cast<char*>(body.data()), MHD_RESPMEM_MUST_COPY);
  if (response == nullptr) return MHD_NO;
  MHD_add_response_header(response, MHD_HTTP_HEADER_CONTENT_TYPE, type);
  MHD_add_response_header(response, MHD_HTTP_HEADER_CONNECTION, "close");
  if (status == MHD_HTTP_METHOD_NOT_ALLOWED) {
    MHD_add_response_header(response, MHD_HTTP_HEADER_ALLOW, "GET, HEAD");
  }
  const MHD_Result queued = MHD_queue_response(connection, status, response);
  MHD_destroy_response(response);
  return queued;
}

}  // namespace

struct HttpServer::Impl {
  explicit Impl(Options server_options)
      : options(std::move(server_options)),
        cutter([this] { CutOld(); }, std::chrono::milliseconds(1000), [] {}) {}
  ~Impl() {
    cutter.Stop();
    for (MHD_Daemon* const daemon : daemons) MHD_stop_daemon(daemon);
  }

  static MHD_Result Handle(void* self, MHD_Connection* connection, const char* url,
                           const char* method, const char* /*version*/, const char* /*data*/,
                           size_t* data_bytes, void** /*request*/) {
    // A body is not read: the answer is on its way and closes the connection.
    *data_bytes = 0;
    MHD_Result result = MHD_NO;
    base::RunGuarded([&] {
      result = static_cast<const Impl*>(self)->Serve(connection, url, method);
      return absl::OkStatus();
    }).IgnoreError();
    return result;
  }

  MHD_Result Serve(MHD_Connection* connection, std::string_view path,
                   std::string_view method) const {
    if (method != MHD_HTTP_METHOD_GET && method != MHD_HTTP_METHOD_HEAD) {
      return Answer(connection, MHD_HTTP_METHOD_NOT_ALLOWED, kTextType, "GET or HEAD\n");
    }
    if (path == "/metrics") {
      return Answer(connection, MHD_HTTP_OK, kMetricsType, options.metrics_text());
    }
    if (path == "/healthz") {
      const absl::Status health = options.health();
      return Answer(connection, health.ok() ? MHD_HTTP_OK : MHD_HTTP_SERVICE_UNAVAILABLE, kTextType,
                    health.ok() ? "ok\n" : absl::StrCat(health.message(), "\n"));
    }
    return Answer(connection, MHD_HTTP_NOT_FOUND, kTextType, "/metrics or /healthz\n");
  }

  // The library closes a connection after this has said that it is over.
  static void Notify(void* self, MHD_Connection* connection, void** /*context*/,
                     MHD_ConnectionNotificationCode what) {
    auto& impl = *static_cast<Impl*>(self);
    const base::MutexLock lock(impl.mu);
    if (what == MHD_CONNECTION_NOTIFY_CLOSED) {
      impl.since.erase(connection);
      return;
    }
    const MHD_ConnectionInfo* const info =
        MHD_get_connection_info(connection, MHD_CONNECTION_INFO_CONNECTION_FD);
    if (info != nullptr) impl.since[connection] = {info->connect_fd, Clock::now()};
  }

  // The library's own limit is one of silence: a byte a second would keep a connection for ever.
  void CutOld() {
    const base::MutexLock lock(mu);
    for (const auto& [connection, opened] : since) {
      if (Clock::now() - opened.second > kLifetime) shutdown(opened.first, SHUT_RDWR);
    }
  }

  const Options options;
  int port = 0;
  base::Mutex mu;
  // Sockets of open connections, and when they were opened.
  std::map<MHD_Connection*, std::pair<int, Clock::time_point>> since ABSL_GUARDED_BY(mu);
  std::vector<MHD_Daemon*> daemons;
  PeriodicTask cutter;
};

HttpServer::HttpServer(std::unique_ptr<Impl> impl) : impl_(std::move(impl)) {}

HttpServer::~HttpServer() = default;

int HttpServer::port() const { return impl_->port; }

absl::StatusOr<std::unique_ptr<HttpServer>> HttpServer::Start(Options options) {
  const absl::StatusOr<base::Address> address = base::ParseAddress(options.listen);
  if (!address.ok() || address->is_unix()) {
    return absl::InvalidArgumentError(
        absl::StrCat("expected HOST:PORT with a port of 0 to 65535, got \"", options.listen, "\""));
  }
  absl::StatusOr<base::ListeningSockets> listening = base::Listen(*address);
  if (!listening.ok()) {
    return absl::Status(
        listening.status().code(),
        absl::StrCat("cannot listen on ", options.listen, ": ", listening.status().message()));
  }
  auto impl = std::make_unique<Impl>(std::move(options));
  impl->port = listening->port;
  for (base::FileDescriptor& socket : listening->sockets) {
    MHD_Daemon* const daemon = MHD_start_daemon(
        MHD_USE_EPOLL_INTERNAL_THREAD, 0, nullptr, nullptr, &Impl::Handle, impl.get(),
        MHD_OPTION_LISTEN_SOCKET, socket.get(), MHD_OPTION_CONNECTION_LIMIT, kMaxConnections,
        MHD_OPTION_PER_IP_CONNECTION_LIMIT, kMaxConnectionsOfOne,
        MHD_OPTION_CONNECTION_MEMORY_LIMIT, kConnectionBytes, MHD_OPTION_CONNECTION_TIMEOUT,
        kSilenceSeconds, MHD_OPTION_NOTIFY_CONNECTION, &Impl::Notify, impl.get(), MHD_OPTION_END);
    if (daemon == nullptr) return absl::UnavailableError("the HTTP server does not start");
    // The library closes it from now on.
    static_cast<void>(socket.Release());
    impl->daemons.push_back(daemon);
  }
  impl->cutter.Start();
  return std::unique_ptr<HttpServer>(new HttpServer(std::move(impl)));
}

}  // namespace certiq::server
