// Per-tenant quotas of memory, disk space, jobs and streams.

#ifndef CERTIQ_RUNTIME_TENANT_QUOTA_H_
#define CERTIQ_RUNTIME_TENANT_QUOTA_H_

#include <cstdint>
#include <map>
#include <memory>
#include <string>
#include <utility>

#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "base/mutex.h"
#include "runtime/byte_budget.h"
#include "runtime/tenant.h"

namespace certiq::server {

// Counting quota: at most `limit` permits at a time. Thread-safe; outlives its permits.
class CountQuota {
 public:
  // Counts as one until it is destroyed. Movable.
  class Permit {
   public:
    Permit() = default;
    Permit(Permit&& other) noexcept : quota_(std::exchange(other.quota_, nullptr)) {}
    Permit& operator=(Permit&& other) noexcept {
      std::swap(quota_, other.quota_);
      return *this;
    }
    ~Permit() {
      if (quota_ != nullptr) quota_->Give();
    }

   private:
    friend class CountQuota;
    explicit Permit(CountQuota* quota) : quota_(quota) {}
    CountQuota* quota_ = nullptr;
  };

  void SetLimit(int64_t limit) ABSL_LOCKS_EXCLUDED(mu_);
  // RESOURCE_EXHAUSTED if all permits are taken, with a retry delay unless the limit is 0. `what`
  // names the thing that is counted, for example "jobs".
  absl::StatusOr<Permit> Take(absl::string_view what) ABSL_LOCKS_EXCLUDED(mu_);
  // May pass the limit. It is for what exists already, such as jobs that were found at the start.
  Permit TakeUnchecked() ABSL_LOCKS_EXCLUDED(mu_);

 private:
  void Give() ABSL_LOCKS_EXCLUDED(mu_);

  base::Mutex mu_;
  int64_t limit_ ABSL_GUARDED_BY(mu_) = kNoLimit;
  int64_t taken_ ABSL_GUARDED_BY(mu_) = 0;
};

// A tenant's parts of the server's budgets.
struct TenantQuota {
  TenantQuota(ByteBudget& whole_memory, ByteBudget& whole_disk)
      : memory(kNoLimit, whole_memory, "this tenant's memory"),
        answers(whole_memory.capacity() / 2, memory, "this tenant's open answers"),
        disk(kNoLimit, whole_disk, "this tenant's disk space") {}

  ByteBudget memory;
  // The part of it that streams of answers hold, which their clients may leave unread: half of the
  // server's at most, so that others find room.
  ByteBudget answers;
  ByteBudget disk;
  CountQuota jobs;
  CountQuota streams;
};

// The quota of each tenant. Thread-safe. References stay valid: a quota that was made is kept, and
// there are no more of them than tenants.
class TenantQuotas {
 public:
  TenantQuotas(ByteBudget& memory, ByteBudget& disk) : memory_(memory), disk_(disk) {}

  // Sets the quota's limits to those of `tenant`.
  TenantQuota& Of(const Tenant& tenant) ABSL_LOCKS_EXCLUDED(mu_);
  // Leaves the limits as they were set last.
  TenantQuota& Of(const std::string& tenant) ABSL_LOCKS_EXCLUDED(mu_);

 private:
  ByteBudget& memory_;
  ByteBudget& disk_;
  base::Mutex mu_;
  std::map<std::string, std::unique_ptr<TenantQuota>> quotas_ ABSL_GUARDED_BY(mu_);
};

}  // namespace certiq::server

#endif  // CERTIQ_RUNTIME_TENANT_QUOTA_H_
