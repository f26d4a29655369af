#include "rpc/calls/call_registry.h"

namespace certiq::server {

void CallRegistry::Add(LiveCall* call) {
  const std::lock_guard lock(mu_);
  calls_.insert(call);
}

void CallRegistry::Remove(LiveCall* call) {
  const std::lock_guard lock(mu_);
  calls_.erase(call);
  if (calls_.empty()) changed_.notify_all();
}

void CallRegistry::AbortAll(const absl::Status& reason, bool only_waiting) {
  // Held throughout: no call can go away while it is spoken to.
  const std::lock_guard lock(mu_);
  for (LiveCall* const call : calls_) call->Abort(reason, only_waiting);
}

void CallRegistry::WaitEmpty() {
  std::unique_lock lock(mu_);
  changed_.wait(lock, [this] { return calls_.empty(); });
}

bool CallRegistry::WaitEmptyUntil(std::chrono::steady_clock::time_point deadline) {
  std::unique_lock lock(mu_);
  changed_.wait_until(lock, deadline, [this] { return calls_.empty() || hurry_; });
  return calls_.empty();
}

void CallRegistry::Hurry() {
  const std::lock_guard lock(mu_);
  hurry_ = true;
  changed_.notify_all();
}

}  // namespace certiq::server
