// A thread that looks after what is due.

#ifndef CERTIQ_JOBS_HOUSEKEEPER_H_
#define CERTIQ_JOBS_HOUSEKEEPER_H_

#include <chrono>
#include <condition_variable>
#include <functional>
#include <mutex>
#include <thread>

namespace certiq::jobs {

// Calls `work` every `interval`, and soon after Wake. Thread-safe.
class Housekeeper {
 public:
  Housekeeper(std::function<void()> work, std::chrono::milliseconds interval);
  // Waits for `work` to end.
  ~Housekeeper();
  Housekeeper(const Housekeeper&) = delete;
  Housekeeper& operator=(const Housekeeper&) = delete;

  void Wake();

 private:
  void Run();

  const std::function<void()> work_;
  const std::chrono::milliseconds interval_;
  std::mutex mu_;
  std::condition_variable changed_;
  bool woken_ = false;  // guarded by mu_
  bool done_ = false;   // guarded by mu_
  std::thread thread_;  // last: it uses the rest
};

}  // namespace certiq::jobs

#endif  // CERTIQ_JOBS_HOUSEKEEPER_H_
