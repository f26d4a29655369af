// How much of a job's progress is passed on.

#ifndef CERTIQ_RUNTIME_THROTTLE_H_
#define CERTIQ_RUNTIME_THROTTLE_H_

#include <chrono>
#include <mutex>
#include <optional>

#include "engine/run_context.h"

namespace certiq::server {

// Lets every new phase pass, and of one phase what comes kInterval or more after the last. The
// engine reports some 600 steps of a large layer; a message for each took the cores that are to
// quantize it. Thread-safe.
class ProgressGate {
 public:
  using Clock = std::chrono::steady_clock;
  static constexpr std::chrono::milliseconds kInterval{50};

  bool Passes(engine::Phase phase, Clock::time_point now = Clock::now()) {
    const std::lock_guard lock(mu_);
    if (phase == phase_ && now < next_) return false;
    phase_ = phase;
    next_ = now + kInterval;
    return true;
  }

 private:
  std::mutex mu_;
  std::optional<engine::Phase> phase_;
  Clock::time_point next_;
};

}  // namespace certiq::server

#endif  // CERTIQ_RUNTIME_THROTTLE_H_
