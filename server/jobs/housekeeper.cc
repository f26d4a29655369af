#include "jobs/housekeeper.h"

#include <utility>

namespace certiq::jobs {

Housekeeper::Housekeeper(std::function<void()> work, std::chrono::milliseconds interval)
    : work_(std::move(work)), interval_(interval), thread_([this] { Run(); }) {}

Housekeeper::~Housekeeper() {
  {
    const std::lock_guard lock(mu_);
    done_ = true;
  }
  changed_.notify_all();
  thread_.join();
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
