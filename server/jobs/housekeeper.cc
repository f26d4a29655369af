#include "jobs/housekeeper.h"

namespace certiq::jobs {

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
  std::unique_lock lock(mu_);
  while (!done_) {
    changed_.wait_for(lock, interval_, [this] { return woken_ || done_; });
    if (done_) return;
    woken_ = false;
    lock.unlock();
    work_();
    lock.lock();
  }
}

}  // namespace certiq::jobs
