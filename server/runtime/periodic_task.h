// Periodic background task with a wake-up.

#ifndef CERTIQ_RUNTIME_PERIODIC_TASK_H_
#define CERTIQ_RUNTIME_PERIODIC_TASK_H_

#include <chrono>
#include <functional>
#include <thread>
#include <utility>

#include "base/mutex.h"

namespace certiq::server {

// Calls `due` every `interval`, and `woken` after every `due` and soon after every Wake. Both run
// on a thread of its own, one at a time. Thread-safe.
class PeriodicTask {
 public:
  PeriodicTask(std::function<void()> due, std::chrono::milliseconds interval,
               std::function<void()> woken)
      : due_(std::move(due)), interval_(interval), woken_work_(std::move(woken)) {}
  ~PeriodicTask() { Stop(); }
  PeriodicTask(const PeriodicTask&) = delete;
  PeriodicTask& operator=(const PeriodicTask&) = delete;

  // To be called once.
  void Start() {
    thread_ = std::thread([this] { Run(); });
  }
  void Wake() ABSL_LOCKS_EXCLUDED(mu_);
  // Waits for a callback that runs. Idempotent.
  void Stop() ABSL_LOCKS_EXCLUDED(mu_);

 private:
  void Run() ABSL_LOCKS_EXCLUDED(mu_);

  const std::function<void()> due_;
  const std::chrono::milliseconds interval_;
  const std::function<void()> woken_work_;
  base::Mutex mu_;
  base::ConditionVariable changed_;
  bool woken_ ABSL_GUARDED_BY(mu_) = false;
  bool done_ ABSL_GUARDED_BY(mu_) = false;
  std::thread thread_;
};

}  // namespace certiq::server

#endif  // CERTIQ_RUNTIME_PERIODIC_TASK_H_
