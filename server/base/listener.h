// Tells somebody that something changed.

#ifndef CERTIQ_BASE_LISTENER_H_
#define CERTIQ_BASE_LISTENER_H_

#include <functional>
#include <mutex>
#include <utility>

namespace certiq::base {

// Whoever is told looks for themselves what changed, so that many changes may become one message.
// Thread-safe.
class Listener {
 public:
  // `changed` is called by whoever made the change, without locks of theirs that the listener's
  // owner could want.
  explicit Listener(std::function<void()> changed) : changed_(std::move(changed)) {}

  void Notify() {
    const std::lock_guard lock(mu_);
    if (changed_) changed_();
  }
  // Once this returns `changed` neither runs nor will. Not to be called from `changed`.
  void Detach() {
    const std::lock_guard lock(mu_);
    changed_ = nullptr;
  }

 private:
  std::mutex mu_;
  std::function<void()> changed_;  // guarded by mu_
};

}  // namespace certiq::base

#endif  // CERTIQ_BASE_LISTENER_H_
