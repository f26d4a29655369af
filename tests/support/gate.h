// A door that tests open: how one thread waits for another without sleeping.

#ifndef CERTIQ_TESTS_SUPPORT_GATE_H_
#define CERTIQ_TESTS_SUPPORT_GATE_H_

#include <chrono>
#include <condition_variable>
#include <mutex>

namespace certiq::testing {

// Long enough for a sanitizer on a busy machine; reaching it is a failure.
inline constexpr std::chrono::seconds kPatience{120};

// Thread-safe.
class Gate {
 public:
  void Open() {
    const std::lock_guard lock(mu_);
    open_ = true;
    opened_.notify_all();
  }
  // False if it stayed shut for `limit`.
  bool Wait(std::chrono::milliseconds limit = kPatience) {
    std::unique_lock lock(mu_);
    return opened_.wait_for(lock, limit, [this] { return open_; });
  }
  bool is_open() {
    const std::lock_guard lock(mu_);
    return open_;
  }

 private:
  std::mutex mu_;
  std::condition_variable opened_;
  bool open_ = false;
};

}  // namespace certiq::testing

#endif  // CERTIQ_TESTS_SUPPORT_GATE_H_
