// Detachable change callback.

#ifndef CERTIQ_BASE_LISTENER_H_
#define CERTIQ_BASE_LISTENER_H_

#include <functional>
#include <utility>

#include "base/mutex.h"

namespace certiq::base {

// The callback carries no data: its owner reads the state that changed, so that many changes may
// become one message. Thread-safe.
class Listener {
 public:
  // `changed` runs on the thread that made the change. That thread holds no lock that `changed`
  // could take.
  explicit Listener(std::function<void()> changed) : changed_(std::move(changed)) {}

  void Notify() ABSL_LOCKS_EXCLUDED(mu_) {
    const MutexLock lock(mu_);
    if (changed_) changed_();
  }
  // Once this returns, `changed` neither runs nor will. Not to be called from `changed`.
  void Detach() ABSL_LOCKS_EXCLUDED(mu_) {
    const MutexLock lock(mu_);
    changed_ = nullptr;
  }

 private:
  Mutex mu_;
  std::function<void()> changed_ ABSL_GUARDED_BY(mu_);
};

}  // namespace certiq::base

#endif  // CERTIQ_BASE_LISTENER_H_
