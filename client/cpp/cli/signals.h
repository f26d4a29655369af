// Interrupts, SIGINT and SIGTERM, as a std::stop_token.
#ifndef CERTIQ_CLIENT_CPP_CLI_SIGNALS_H_
#define CERTIQ_CLIENT_CPP_CLI_SIGNALS_H_

#include <atomic>
#include <stop_token>
#include <thread>

namespace certiq::cli {

// SIGINT and SIGTERM stop the token instead of ending the process, so that a call is cancelled
// and temporary files go away. A thread of its own waits for them, because hardly anything may be
// done within a signal handler. It is made before any other thread; a
// process has at most one.
class InterruptWatcher {
 public:
  InterruptWatcher();
  InterruptWatcher(const InterruptWatcher&) = delete;
  InterruptWatcher& operator=(const InterruptWatcher&) = delete;
  ~InterruptWatcher();

  // Thread-safe.
  std::stop_token token() const { return source_.get_token(); }

  // 128 + the signal that came; that of SIGINT if none did. Thread-safe.
  int exit_code() const;

 private:
  void Wait();

  std::stop_source source_;
  std::atomic<int> signal_{0};
  int signals_fd_ = -1;
  int quit_fd_ = -1;
  std::thread thread_;
};

}  // namespace certiq::cli

#endif  // CERTIQ_CLIENT_CPP_CLI_SIGNALS_H_
