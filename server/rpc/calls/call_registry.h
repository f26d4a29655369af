// Registry of live calls, for drain and shutdown.

#ifndef CERTIQ_RPC_CALLS_CALL_REGISTRY_H_
#define CERTIQ_RPC_CALLS_CALL_REGISTRY_H_

#include <chrono>
#include <set>

#include "absl/status/status.h"
#include "base/mutex.h"

namespace certiq::server {

// A call that can be told to end.
class LiveCall {
 public:
  virtual ~LiveCall() = default;
  // Ends the call with `reason` as soon as its work has stopped. With `only_waiting`, only if it
  // has not been admitted yet. Called with the registry's lock held: it neither blocks nor calls
  // the registry.
  virtual void Abort(const absl::Status& reason, bool only_waiting) = 0;
  // Ends the call where its token was revoked or its client lets it wait for too long. Called like
  // Abort.
  virtual void Supervise(std::chrono::steady_clock::time_point now) = 0;
};

// Thread-safe. A call adds itself when it starts and removes itself before it is deleted, so that
// every call in the registry is alive; Deleted says that nothing of it is left.
class CallRegistry {
 public:
  void Add(LiveCall* call) ABSL_LOCKS_EXCLUDED(mu_);
  // Each of the two once a call.
  void Remove(LiveCall* call) ABSL_LOCKS_EXCLUDED(mu_);
  void Deleted() ABSL_LOCKS_EXCLUDED(mu_);

  void AbortAll(const absl::Status& reason, bool only_waiting) ABSL_LOCKS_EXCLUDED(mu_);
  void SuperviseAll(std::chrono::steady_clock::time_point now) ABSL_LOCKS_EXCLUDED(mu_);

  // Waits until no call is left, nor anything that one held.
  void WaitEmpty() ABSL_LOCKS_EXCLUDED(mu_);
  // The same; false if `deadline` came or Hurry was called first.
  bool WaitEmptyUntil(std::chrono::steady_clock::time_point deadline) ABSL_LOCKS_EXCLUDED(mu_);
  // Ends WaitEmptyUntil, now and later.
  void Hurry() ABSL_LOCKS_EXCLUDED(mu_);

 private:
  base::Mutex mu_;
  base::ConditionVariable changed_;
  std::set<LiveCall*> calls_ ABSL_GUARDED_BY(mu_);
  // Removed and not yet deleted.
  int going_ ABSL_GUARDED_BY(mu_) = 0;
  bool hurry_ ABSL_GUARDED_BY(mu_) = false;
};

}  // namespace certiq::server

#endif  // CERTIQ_RPC_CALLS_CALL_REGISTRY_H_
