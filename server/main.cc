// The program certiq-server: flags, signals, wiring.

#include <pthread.h>
#include <sys/resource.h>
#include <unistd.h>

#include <CLI/CLI.hpp>
#include <algorithm>
#include <cctype>
#include <chrono>
#include <cmath>
#include <csignal>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <exception>
#include <filesystem>
#include <fstream>
#include <functional>
#include <iostream>
#include <memory>
#include <string>
#include <string_view>
#include <system_error>
#include <thread>
#include <utility>

#include "absl/status/statusor.h"
#include "absl/strings/str_cat.h"
#include "backend.h"
#include "base/address.h"
#include "base/clock.h"
#include "base/memory_limit.h"
#include "base/mutex.h"
#include "engine/quantize_layer.h"
#include "observability/http_server.h"
#include "observability/log.h"
#include "observability/metrics.h"
#include "rpc/calls/call_summary.h"
#include "rpc/transport/auth.h"
#include "rpc/transport/credentials.h"
#include "rpc/transport/file.h"
#include "rpc/transport/library_log.h"
#include "rpc/transport/probe.h"
#include "rpc/transport/server.h"
#include "store/storage.h"

namespace {

namespace base = certiq::base;
namespace engine = certiq::engine;
namespace server = certiq::server;

constexpr int kExitFailure = 1;
constexpr int kExitUsage = 2;
constexpr std::chrono::seconds kProbeLimit{5};

// Raises the limit of open files to what this process may have, and returns it.
int64_t RaiseFileLimit() {
  rlimit limit = {};
  if (getrlimit(RLIMIT_NOFILE, &limit) != 0) return 1024;
  constexpr rlim_t kEnough = rlim_t{1} << 20;
  const rlim_t wanted = std::min(limit.rlim_max, kEnough);
  if (limit.rlim_cur < wanted) {
    limit.rlim_cur = wanted;
    static_cast<void>(setrlimit(RLIMIT_NOFILE, &limit));
    static_cast<void>(getrlimit(RLIMIT_NOFILE, &limit));
  }
  return static_cast<int64_t>(std::min(limit.rlim_cur, kEnough));
}

// Half of the open files that the process may have: the others are for the store and the metrics.
int DefaultConnections() {
  return static_cast<int>(std::clamp<int64_t>(RaiseFileLimit() / 2, 16, 8192));
}

struct Flags {
  std::string listen = "127.0.0.1:8470";
  std::string metrics_listen = "127.0.0.1:8471";
  std::string data_dir;
  std::string accept_loss;
  int workers = std::max(1, static_cast<int>(std::thread::hardware_concurrency()));
  int queue_limit = 256;
  int max_connections = DefaultConnections();
  int64_t memory_budget_bytes = base::MemoryLimitBytes() / 5 * 4;
  int64_t disk_budget_bytes = int64_t{1} << 60;
  double commit_seconds = 5;
  server::TlsFiles tls;
  std::string token_file;
  double drain_seconds = 30;
  std::string log_format = "text";
  std::string port_file;
  bool allow_cleartext = false;
  bool reflection = true;
  bool probe = false;
};

// The environment variable of a flag: CERTIQ_METRICS_LISTEN for metrics_listen.
std::string EnvironmentName(std::string flag) {
  std::transform(flag.begin(), flag.end(), flag.begin(),
                 [](unsigned char c) { return static_cast<char>(std::toupper(c)); });
  return "CERTIQ_" + flag;
}

// A flag that may also be given as its environment variable; the command line wins.
template <typename T>
CLI::Option* AddFlag(CLI::App& app, const std::string& name, T& value, const std::string& help) {
  return app.add_option("--" + name, value, help)
      ->envname(EnvironmentName(name))
      ->capture_default_str();
}

void AddText(CLI::App& app, const std::string& name, std::string& value, const std::string& help) {
  // CLI11 ignores a variable that is set but empty.
  // NOLINTNEXTLINE(concurrency-mt-unsafe): there is one thread yet.
  const char* const set = std::getenv(EnvironmentName(name).c_str());
  if (set != nullptr && *set == '\0') value.clear();
  AddFlag(app, name, value, help);
}

void AddSwitch(CLI::App& app, const std::string& name, bool& value, const std::string& help) {
  app.add_flag("--" + name + ",!--no-" + name, value, help)->envname(EnvironmentName(name));
}

void AddFlags(CLI::App& app, Flags& flags) {
  app.set_version_flag("--version", std::string("certiq-server ") + engine::EngineVersion());
  AddText(app, "listen", flags.listen,
          "gRPC on HOST:PORT, [IPV6]:PORT or unix:PATH; port 0: a free one");
  AddText(app, "metrics_listen", flags.metrics_listen,
          "/metrics and /healthz over HTTP on HOST:PORT; empty: off");
  AddText(app, "data_dir", flags.data_dir,
          "folder for calibrations, jobs and results; empty: in memory, gone with the process");
  AddText(app, "accept_loss", flags.accept_loss,
          "go on without what --data_dir has lost: the code that the refused start named");
  AddFlag(app, "workers", flags.workers, "compute threads")->check(CLI::Range(1, 4096));
  AddFlag(app, "queue_limit", flags.queue_limit, "layers that may upload or wait")
      ->check(CLI::Range(1, 1000000));
  AddFlag(app, "max_connections", flags.max_connections,
          "gRPC connections at a time, half of them from one peer; default: half of the open files "
          "that the process may have")
      ->check(CLI::Range(2, 1000000));
  AddFlag(
      app, "memory_budget_bytes", flags.memory_budget_bytes,
      "bytes that clients may make the server hold; default 80 % of the machine's or container's")
      ->check(CLI::Range(int64_t{1}, int64_t{1} << 60));
  AddFlag(app, "disk_budget_bytes", flags.disk_budget_bytes,
          "bytes that clients may make the server keep in --data_dir; default: no limit of its own")
      ->check(CLI::Range(int64_t{1}, int64_t{1} << 60));
  AddFlag(app, "commit_seconds", flags.commit_seconds,
          "how long rows that were received may wait to be on disk")
      ->check(CLI::Range(0.01, 3600.0));
  AddText(app, "tls_cert", flags.tls.cert, "server certificate and chain, PEM; turns TLS on");
  AddText(app, "tls_key", flags.tls.key, "its key, PEM");
  AddText(app, "tls_client_ca", flags.tls.client_ca,
          "authorities of client certificates, PEM; clients must show one of theirs");
  AddText(app, "token_file", flags.token_file,
          "who is let in, a line each: TOKEN TENANT SCOPES [LIMIT=VALUE ...]; empty: everyone");
  AddFlag(app, "drain_seconds", flags.drain_seconds,
          "what calls may take to end after SIGTERM; writing what streams brought last may take 5 "
          "s more")
      ->check(CLI::Range(0.0, 86400.0));
  AddText(app, "log_format", flags.log_format, "text or json");
  AddText(app, "port_file", flags.port_file,
          "file for the gRPC port once it listens; FILE.metrics for the other");
  AddSwitch(app, "allow_cleartext", flags.allow_cleartext, "serve clear text beyond loopback");
  AddSwitch(app, "reflection", flags.reflection, "gRPC server reflection (on by default)");
  AddSwitch(app, "probe", flags.probe, "ask the server at --listen for its health and exit 0 or 1");
}

// Renames a complete file into place, so that no reader sees half of it. False with a reason in
// errno.
bool WritePort(const std::string& path, int port) {
  const std::string temporary = path + ".tmp" + std::to_string(getpid());
  {
    std::ofstream out(temporary, std::ios::trunc);
    out << port << '\n';
    if (!out.flush()) return false;
  }
  return std::rename(temporary.c_str(), path.c_str()) == 0;
}

// Receives SIGTERM and SIGINT on a thread of its own. REQUIRES: both are blocked in every thread,
// that is, they were blocked before any other thread was started.
class StopSignals {
 public:
  static sigset_t Set() {
    sigset_t set;
    sigemptyset(&set);
    sigaddset(&set, SIGTERM);
    sigaddset(&set, SIGINT);
    sigaddset(&set, kEndThread);
    return set;
  }

  StopSignals() : thread_([this] { Take(); }) {}
  ~StopSignals() {
    {
      const base::MutexLock lock(mu_);
      done_ = true;
    }
    pthread_kill(thread_.native_handle(), kEndThread);
    thread_.join();
  }
  StopSignals(const StopSignals&) = delete;
  StopSignals& operator=(const StopSignals&) = delete;

  // Waits for the first signal and returns its number.
  int Wait() ABSL_LOCKS_EXCLUDED(mu_) {
    const base::MutexLock lock(mu_);
    while (first_ == 0) arrived_.Wait(mu_);
    return first_;
  }

  // `action` runs at the second signal, or at once if that came already.
  void OnSecond(std::function<void()> action) ABSL_LOCKS_EXCLUDED(mu_) {
    const base::MutexLock lock(mu_);
    on_second_ = std::move(action);
    if (count_ >= 2) on_second_();
  }

 private:
  // The destructor wakes the thread with it; one from outside is ignored.
  static constexpr int kEndThread = SIGUSR1;

  void Take() ABSL_LOCKS_EXCLUDED(mu_) {
    const sigset_t set = Set();
    for (;;) {
      int signal = 0;
      if (sigwait(&set, &signal) != 0) continue;
      const base::MutexLock lock(mu_);
      if (done_) return;
      if (signal == kEndThread) continue;
      ++count_;
      if (count_ == 1) first_ = signal;
      if (count_ == 2 && on_second_) on_second_();
      arrived_.NotifyAll();
    }
  }

  base::Mutex mu_;
  base::ConditionVariable arrived_;
  int count_ ABSL_GUARDED_BY(mu_) = 0;
  int first_ ABSL_GUARDED_BY(mu_) = 0;
  bool done_ ABSL_GUARDED_BY(mu_) = false;
  std::function<void()> on_second_ ABSL_GUARDED_BY(mu_);
  // Last, since it uses the other members.
  std::thread thread_;
};

server::CallLog LogCallsTo(const server::Log& log) {
  return [&log](const server::CallSummary& call) {
    server::LogFields fields = {
        {"method", std::string(call.method)},
        {"tenant", call.tenant},
        {"request_id", call.request_id},
        {"layer", call.layer_name},
        {"rows", call.rows},
        {"features", call.features},
        {"tokens", call.tokens},
        {"received_bytes", call.received_bytes},
        {"sent_bytes", call.sent_bytes},
        {"seconds", call.seconds},
        {"code", absl::StatusCodeToString(call.status.code())},
    };
    for (const auto& [name, value] : {std::pair{"calibration", &call.calibration_id},
                                      {"stream", &call.stream_id},
                                      {"job", &call.job_id}}) {
      if (!value->empty()) fields.emplace_back(name, *value);
    }
    if (!call.status.ok()) fields.emplace_back("message", std::string(call.status.message()));
    log.Info("rpc", fields);
  };
}

// The process's log, for library messages that arrive until the process ends.
const server::Log* process_log = nullptr;

double Seconds(base::UnixMicros from, base::UnixMicros to) {
  return from == 0 ? 0 : 1e-6 * static_cast<double>(to - from);
}

std::function<void(const server::JobRecord&, const absl::Status&)> LogJobsTo(
    const server::Log& log) {
  return [&log](const server::JobRecord& job, const absl::Status& outcome) {
    server::LogFields fields = {
        {"id", job.id()},
        {"tenant", job.tenant()},
        {"request_id", job.request_id()},
        {"layer", job.layer_name()},
        {"calibration", job.calibration_id()},
        {"rows", job.rows()},
        {"features", job.features()},
        {"starts", int64_t{job.starts()}},
        {"result_bytes", job.result().tensor_bytes()},
        {"relative_error", job.result().relative_error()},
        {"seconds", Seconds(job.create_time(), job.end_time())},
        {"run_seconds", Seconds(job.start_time(), job.end_time())},
        {"code", absl::StatusCodeToString(outcome.code())},
    };
    if (!outcome.ok()) fields.emplace_back("message", std::string(outcome.message()));
    log.Info("job", fields);
  };
}

const char* TlsMode(const server::TlsFiles& tls) {
  if (!tls.enabled()) return "off";
  return tls.client_ca.empty() ? "on" : "on, with client certificates";
}

int Serve(const Flags& flags, const server::Log& log) {
  // Blocked before the first thread is started, so that every thread inherits it.
  const sigset_t stop_signals = StopSignals::Set();
  pthread_sigmask(SIG_BLOCK, &stop_signals, nullptr);
  std::signal(SIGPIPE, SIG_IGN);
  // The store treats a file size limit (RLIMIT_FSIZE) as a full disk.
  std::signal(SIGXFSZ, SIG_IGN);

  const auto failed = [&log](const std::string& why) {
    log.Error("start_failed", {{"reason", why}});
    return kExitFailure;
  };
  if (!flags.port_file.empty()) {
    // Port files of an earlier run would send a reader to the wrong server.
    std::error_code ignored;
    std::filesystem::remove(flags.port_file, ignored);
    std::filesystem::remove(flags.port_file + ".metrics", ignored);
  }

  server::Metrics counters({.version = engine::EngineVersion(),
                            .isa = engine::EngineIsa(),
                            .drain_limit = flags.drain_seconds});
  auto storage = server::OpenStorage(flags.data_dir, flags.accept_loss);
  if (!storage.ok()) {
    return failed(absl::StrCat("--data_dir: ", storage.status().message()));
  }
  for (const std::string& warning : storage->warnings) {
    log.Warning("data_dir", {{"message", warning}});
  }
  const std::chrono::milliseconds commit(std::llround(flags.commit_seconds * 1000));
  auto backend = server::Backend::Start({.workers = flags.workers,
                                         .queue_limit = flags.queue_limit,
                                         .memory_bytes = flags.memory_budget_bytes,
                                         .disk_bytes = flags.disk_budget_bytes,
                                         .cache_bytes = flags.memory_budget_bytes / 4,
                                         .commit_interval = commit,
                                         .observer = &counters,
                                         .job_log = LogJobsTo(log)},
                                        *std::move(storage));
  if (!backend.ok()) return failed(absl::StrCat("--data_dir: ", backend.status().message()));
  const server::Warn warn = [&log](const std::string& message) {
    log.Warning("security", {{"message", message}});
  };
  auto auth = std::make_unique<server::Authenticator>();
  if (!flags.token_file.empty()) {
    auto opened = server::Authenticator::Open(flags.token_file, warn);
    if (!opened.ok()) return failed(std::string(opened.status().message()));
    auth = *std::move(opened);
  }
  const auto server = server::Server::Start(
      {.listen = flags.listen,
       .tls = flags.tls,
       .allow_cleartext = flags.allow_cleartext,
       .reflection = flags.reflection,
       .connections = {.all = flags.max_connections, .per_peer = flags.max_connections / 2},
       .backend = backend->get(),
       .calls = &counters,
       .log = LogCallsTo(log),
       .auth = auth.get(),
       .warn = warn});
  if (!server.ok()) {
    const std::string why(server.status().message());
    return failed(why.rfind("--", 0) == 0 ? why : "--listen: " + why);
  }
  std::unique_ptr<server::HttpServer> http;
  if (!flags.metrics_listen.empty()) {
    auto started =
        server::HttpServer::Start({.listen = flags.metrics_listen,
                                   .metrics_text = [&counters] { return counters.Text(); },
                                   .health = [&server] { return (*server)->health(); }});
    if (!started.ok())
      return failed(absl::StrCat("--metrics_listen: ", started.status().message()));
    http = *std::move(started);
  }
  StopSignals signals;
  if (!flags.port_file.empty()) {
    const bool written =
        (http == nullptr || WritePort(flags.port_file + ".metrics", http->port())) &&
        WritePort(flags.port_file, (*server)->port());
    if (!written) return failed("--port_file: cannot write " + flags.port_file);
  }
  log.Info("listening",
           {{"version", std::string(engine::EngineVersion())},
            {"isa", std::string(engine::EngineIsa())},
            {"listen", flags.listen},
            {"port", int64_t{(*server)->port()}},
            {"tls", std::string(TlsMode(flags.tls))},
            {"tokens", auth->enabled()},
            {"metrics_listen", flags.metrics_listen},
            {"metrics_port", int64_t{http == nullptr ? 0 : http->port()}},
            {"workers", int64_t{flags.workers}},
            {"queue_limit", int64_t{flags.queue_limit}},
            {"max_connections", int64_t{flags.max_connections}},
            {"memory_budget_bytes", flags.memory_budget_bytes},
            {"storage", (*backend)->durable()
                            ? flags.data_dir
                            : std::string("in memory: nothing outlives this process")}});

  const int signal = signals.Wait();
  // Counted before the log line, which blocks while the reader of the log does.
  counters.DrainStarted(1e-6 * static_cast<double>(base::Now()));
  log.Info("draining", {{"signal", int64_t{signal}}, {"drain_seconds", flags.drain_seconds}});
  const auto deadline = std::chrono::steady_clock::now() +
                        std::chrono::milliseconds(std::llround(flags.drain_seconds * 1000));
  signals.OnSecond([&server, &backend] {
    (*server)->Hurry();
    (*backend)->Hurry();
  });
  const bool calls_ended = (*server)->Drain(std::chrono::duration_cast<std::chrono::milliseconds>(
      deadline - std::chrono::steady_clock::now()));
  const bool clean = (*backend)->WaitRunning(deadline) && calls_ended;
  (*backend)->Hurry();
  log.Info("stopped", {{"all_calls_ended", clean}});
  return 0;
}

int Run(int argc, char** argv) {
  Flags flags;
  CLI::App app("Quantizes layers sent over gRPC. Every flag can also be given as CERTIQ_<FLAG>.",
               "certiq-server");
  try {
    AddFlags(app, flags);
    app.parse(argc, argv);
    if (flags.log_format != "text" && flags.log_format != "json") {
      throw CLI::ValidationError("--log_format", "expected text or json, got " + flags.log_format);
    }
    if (const auto address = base::ParseAddress(flags.listen); !address.ok()) {
      throw CLI::ValidationError("--listen", std::string(address.status().message()));
    }
  } catch (const CLI::ParseError& error) {
    // --help and --version end here too.
    return app.exit(error) == 0 ? 0 : kExitUsage;
  }
  if (flags.probe) {
    const absl::Status healthy = server::Probe(flags.listen, flags.tls, kProbeLimit);
    if (!healthy.ok()) std::cerr << healthy.message() << '\n';
    return healthy.ok() ? 0 : kExitFailure;
  }
  const server::Log log(flags.log_format == "json" ? server::LogFormat::kJson
                                                   : server::LogFormat::kText);
  process_log = &log;
  server::SetLibraryLog([](const char* library, const std::string& message) {
    process_log->Warning("library", {{"name", std::string(library)}, {"message", message}});
  });
  const int code = Serve(flags, log);
  server::SetLibraryLog(nullptr);
  return code;
}

}  // namespace

int main(int argc, char** argv) {
  try {
    return Run(argc, argv);
  } catch (const std::exception& error) {
    std::fprintf(stderr, "certiq-server: %s\n", error.what());
  } catch (...) {
    std::fputs("certiq-server: unexpected exception\n", stderr);
  }
  return kExitFailure;
}
