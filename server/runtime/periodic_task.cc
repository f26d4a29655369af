#include "runtime/periodic_task.h"

namespace certiq::server {

void PeriodicTask::Stop() {
  {
    const base::MutexLock lock(mu_);
    done_ = true;
  }
  changed_.NotifyAll();
  if (thread_.joinable()) thread_.join();
}

void PeriodicTask::Wake() {
  {
    const base::MutexLock lock(mu_);
    woken_ = true;
  }
  changed_.NotifyAll();
}

void PeriodicTask::Run() {
  using Clock = std::chrono::steady_clock;
  Clock::time_point next = Clock::now() + interval_;
  for (;;) {
    {
      const base::MutexLock lock(mu_);
      while (!woken_ && !done_ && changed_.WaitUntil(mu_, next)) {
      }
      if (done_) return;
      woken_ = false;
    }
    if (Clock::now() >= next) {
      due_();
      next = Clock::now() + interval_;
    }
    woken_work_();
  }
}

}  // namespace certiq::server
