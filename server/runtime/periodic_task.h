// A thread that looks after what is due.

#ifndef CERTIQ_RUNTIME_PERIODIC_TASK_H_
#define CERTIQ_RUNTIME_PERIODIC_TASK_H_

#include <chrono>
#include <condition_variable>
#include <functional>
#include <mutex>
#include <thread>
#include <utility>

namespace certiq::server {

// Calls `due` every `interval`, and `woken` soon after Wake, both on its thread. Thread-safe.
class Housekeeper {
 public:
  Housekeeper(std::function<void()> due, std::chrono::milliseconds interval,
              std::function<void()> woken)
      : due_(std::move(due)), interval_(interval), woken_work_(std::move(woken)) {}
  ~Housekeeper() { Stop(); }
  Housekeeper(const Housekeeper&) = delete;
  Housekeeper& operator=(const Housekeeper&) = delete;

  // Once.
  void Start() {
    thread_ = std::thread([this] { Run(); });
  }
  void Wake();
  // Waits for what runs to end. Idempotent.
  void Stop();

 private:
  void Run();

  const std::function<void()> due_;
  const std::chrono::milliseconds interval_;
  const std::function<void()> woken_work_;
  std::mutex mu_;
  std::condition_variable changed_;
  bool woken_ = false;  // guarded by mu_
  bool done_ = false;   // guarded by mu_
  std::thread thread_;
};

}  // namespace certiq::server

#endif  // CERTIQ_RUNTIME_PERIODIC_TASK_H_
