// The holdings of stored jobs: their shares of this process's quotas, by their ids.

#ifndef CERTIQ_JOB_JOB_HOLDINGS_H_
#define CERTIQ_JOB_JOB_HOLDINGS_H_

#include <map>
#include <string>
#include <utility>

#include "absl/base/thread_annotations.h"
#include "base/mutex.h"
#include "runtime/reservations.h"
#include "runtime/tenant_quota.h"
#include "runtime/worker_pool.h"

namespace certiq::server {

// Thread-safe.
class JobHoldings {
 public:
  // A job in the queue: its share of its tenant's jobs and its place. The place is parked: the job
  // waits in the catalog, not in the pool.
  void Hold(const std::string& id, CountQuota::Permit permit, WorkerPool::Slot slot) {
    slot.Park();
    const base::MutexLock lock(mu_);
    held_[id] = {std::move(permit), std::move(slot)};
  }
  // Its place, for the pool; none where it was taken before.
  WorkerPool::Slot TakeSlot(const std::string& id) {
    const base::MutexLock lock(mu_);
    const auto found = held_.find(id);
    return found == held_.end() ? WorkerPool::Slot() : std::move(found->second.slot);
  }
  // Gives it a place again where it waits again.
  void GiveSlot(const std::string& id, WorkerPool::Slot slot) {
    slot.Park();
    const base::MutexLock lock(mu_);
    const auto found = held_.find(id);
    if (found != held_.end() && !found->second.slot) std::swap(found->second.slot, slot);
  }
  // It ends.
  void Release(const std::string& id) {
    Held released;
    const base::MutexLock lock(mu_);
    if (const auto found = held_.find(id); found != held_.end()) {
      released = std::move(found->second);
      held_.erase(found);
    }
  }

  // What weights and results take in the store.
  Reservations& stored() { return stored_; }

 private:
  struct Held {
    CountQuota::Permit permit;
    WorkerPool::Slot slot;
  };
  Reservations stored_;
  base::Mutex mu_;
  std::map<std::string, Held> held_ ABSL_GUARDED_BY(mu_);
};

}  // namespace certiq::server

#endif  // CERTIQ_JOB_JOB_HOLDINGS_H_
