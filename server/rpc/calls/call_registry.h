// The calls that are alive, for drain and shutdown.

#ifndef CERTIQ_RPC_CALLS_CALL_REGISTRY_H_
#define CERTIQ_RPC_CALLS_CALL_REGISTRY_H_

#include <chrono>
#include <condition_variable>
#include <mutex>
#include <set>
#include <string>

#include "absl/status/status.h"

namespace certiq::server {

// A call that can be told to end.
class LiveCall {
 public:
  virtual ~LiveCall() = default;
  // Ends the call with `reason` as soon as its work has stopped. With
  // `only_waiting`, only if it has not been admitted yet.
  virtual void Abort(const absl::Status& reason, bool only_waiting) = 0;
};

// Thread-safe. A call adds itself when it starts and removes itself as the last thing it does, so
// that one which is in here can be spoken to.
class CallRegistry {
 public:
  void Add(LiveCall* call);
  void Remove(LiveCall* call);

  void AbortAll(const absl::Status& reason, bool only_waiting);

  // Waits until no call is left.
  void WaitEmpty();
  // The same; false if `deadline` came or Hurry was called first.
  bool WaitEmptyUntil(std::chrono::steady_clock::time_point deadline);
  // Ends WaitEmptyUntil, now and later.
  void Hurry();

 private:
  std::mutex mu_;
  std::condition_variable changed_;
  std::set<LiveCall*> calls_;  // guarded by mu_
  bool hurry_ = false;         // guarded by mu_
};

}  // namespace certiq::server

#endif  // CERTIQ_RPC_CALLS_CALL_REGISTRY_H_
