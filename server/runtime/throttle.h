// Rate limit of progress reports.

#ifndef CERTIQ_RUNTIME_THROTTLE_H_
#define CERTIQ_RUNTIME_THROTTLE_H_

#include <chrono>
#include <optional>

#include "base/mutex.h"
#include "engine/run_context.h"

namespace certiq::server {

// Allows the first report of every phase, and then one report of that phase per kInterval. The
// engine reports some 600 steps of a large layer; sending a message for each costs CPU time that
// the layer needs. Thread-safe.
class Throttle {
 public:
  using Clock = std::chrono::steady_clock;
  static constexpr std::chrono::milliseconds kInterval{50};

  bool Allow(engine::Phase phase, Clock::time_point now = Clock::now()) ABSL_LOCKS_EXCLUDED(mu_) {
    const base::MutexLock lock(mu_);
    if (phase == phase_ && now < next_) return false;
    phase_ = phase;
    next_ = now + kInterval;
    return true;
  }

 private:
  base::Mutex mu_;
  std::optional<engine::Phase> phase_ ABSL_GUARDED_BY(mu_);
  Clock::time_point next_ ABSL_GUARDED_BY(mu_);
};

}  // namespace certiq::server

#endif  // CERTIQ_RUNTIME_THROTTLE_H_
