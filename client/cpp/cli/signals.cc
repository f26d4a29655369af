#include "signals.h"

#include <poll.h>
#include <pthread.h>
#include <sys/eventfd.h>
#include <sys/signalfd.h>
#include <unistd.h>

#include <cerrno>
#include <csignal>
#include <cstdint>

namespace certiq::cli {

InterruptWatcher::InterruptWatcher() {
  sigset_t set;
  sigemptyset(&set);
  sigaddset(&set, SIGINT);
  sigaddset(&set, SIGTERM);
  signals_fd_ = signalfd(-1, &set, SFD_CLOEXEC);
  quit_fd_ = eventfd(0, EFD_CLOEXEC);
  // Without them the signals keep their meaning, which is to end the process.
  if (signals_fd_ < 0 || quit_fd_ < 0) return;
  pthread_sigmask(SIG_BLOCK, &set, nullptr);
  thread_ = std::thread([this] { Wait(); });
}

InterruptWatcher::~InterruptWatcher() {
  if (thread_.joinable()) {
    const uint64_t one = 1;
    while (write(quit_fd_, &one, sizeof(one)) < 0 && errno == EINTR) {
    }
    thread_.join();
  }
  if (signals_fd_ >= 0) close(signals_fd_);
  if (quit_fd_ >= 0) close(quit_fd_);
}

int InterruptWatcher::exit_code() const {
  const int signal = signal_.load();
  return 128 + (signal == 0 ? SIGINT : signal);
}

void InterruptWatcher::Wait() {
  for (;;) {
    pollfd events[] = {{signals_fd_, POLLIN, 0}, {quit_fd_, POLLIN, 0}};
    if (poll(events, 2, -1) < 0 && errno != EINTR) return;
    if (events[1].revents != 0) return;
    if (events[0].revents == 0) continue;
    signalfd_siginfo info = {};
    if (read(signals_fd_, &info, sizeof(info)) != sizeof(info)) return;
    signal_.store(static_cast<int>(info.ssi_signo));
    source_.request_stop();
  }
}

}  // namespace certiq::cli
