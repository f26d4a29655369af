#include "rpc/calls/call_registry.h"

namespace certiq::server {

void CallRegistry::Add(LiveCall* call) {
  const base::MutexLock lock(mu_);
  calls_.insert(call);
}

void CallRegistry::Remove(LiveCall* call) {
  const base::MutexLock lock(mu_);
  calls_.erase(call);
  ++going_;
}

void CallRegistry::Deleted() {
  const base::MutexLock lock(mu_);
  --going_;
  if (calls_.empty() && going_ == 0) changed_.NotifyAll();
}

void CallRegistry::AbortAll(const absl::Status& reason, bool only_waiting) {
  // Held throughout, so that no call is destroyed during its Abort.
  const base::MutexLock lock(mu_);
  for (LiveCall* const call : calls_) call->Abort(reason, only_waiting);
}

void CallRegistry::SuperviseAll(std::chrono::steady_clock::time_point now) {
  const base::MutexLock lock(mu_);
  for (LiveCall* const call : calls_) call->Supervise(now);
}

void CallRegistry::WaitEmpty() {
  const base::MutexLock lock(mu_);
  while (!calls_.empty() || going_ > 0) changed_.Wait(mu_);
}

bool CallRegistry::WaitEmptyUntil(std::chrono::steady_clock::time_point deadline) {
  const base::MutexLock lock(mu_);
  const auto left = [this]() ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_) {
    return !calls_.empty() || going_ > 0;
  };
  while (left() && !hurry_ && changed_.WaitUntil(mu_, deadline)) {
  }
  return !left();
}

void CallRegistry::Hurry() {
  const base::MutexLock lock(mu_);
  hurry_ = true;
  changed_.NotifyAll();
}

}  // namespace certiq::server
