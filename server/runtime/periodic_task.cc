#include "runtime/periodic_task.h"

namespace certiq::server {

void Housekeeper::Stop() {
  {
    const std::lock_guard lock(mu_);
    done_ = true;
  }
  changed_.notify_all();
  if (thread_.joinable()) thread_.join();
}

void Housekeeper::Wake() {
  {
    const std::lock_guard lock(mu_);
    woken_ = true;
  }
  changed_.notify_all();
}

void Housekeeper::Run() {
  using Clock = std::chrono::steady_clock;
  Clock::time_point next = Clock::now() + interval_;
  std::unique_lock lock(mu_);
  for (;;) {
    changed_.wait_until(lock, next, [this] { return woken_ || done_; });
    if (done_) return;
    woken_ = false;
    lock.unlock();
    if (Clock::now() >= next) {
      due_();
      next = Clock::now() + interval_;
    }
    woken_work_();
    lock.lock();
  }
}

}  // namespace certiq::server
