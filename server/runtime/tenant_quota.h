// What each tenant holds of the server.

#ifndef CERTIQ_RUNTIME_TENANT_QUOTA_H_
#define CERTIQ_RUNTIME_TENANT_QUOTA_H_

#include <cstdint>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <utility>

#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "runtime/byte_budget.h"
#include "runtime/tenant.h"

namespace certiq::server {

// So many of something at a time. Thread-safe; outlives its places.
class CountQuota {
 public:
  // One of them, given back on destruction. Movable.
  class Place {
   public:
    Place() = default;
    Place(Place&& other) noexcept : quota_(std::exchange(other.quota_, nullptr)) {}
    Place& operator=(Place&& other) noexcept {
      std::swap(quota_, other.quota_);
      return *this;
    }
    ~Place() {
      if (quota_ != nullptr) quota_->Give();
    }

   private:
    friend class CountQuota;
    explicit Place(CountQuota* quota) : quota_(quota) {}
    CountQuota* quota_ = nullptr;
  };

  void SetLimit(int64_t limit);
  // RESOURCE_EXHAUSTED where there is none, with a retry delay if there can be one. `what`: "jobs".
  absl::StatusOr<Place> Take(absl::string_view what);
  // For what is there already; may pass the limit.
  Place TakeAnyway();

 private:
  void Give();

  std::mutex mu_;
  int64_t limit_ = kNoLimit;  // guarded by mu_
  int64_t taken_ = 0;         // guarded by mu_
};

// A tenant's shares of the whole server's budgets.
struct Account {
  Account(ByteBudget& whole_memory, ByteBudget& whole_disk)
      : memory(kNoLimit, whole_memory, "this tenant's memory"),
        disk(kNoLimit, whole_disk, "this tenant's disk space") {}

  ByteBudget memory;
  ByteBudget disk;
  CountQuota jobs;
  CountQuota streams;
};

// Thread-safe. Accounts stay: there are no more of them than tenants.
class Accounts {
 public:
  Accounts(ByteBudget& memory, ByteBudget& disk) : memory_(memory), disk_(disk) {}

  // With the limits as they are now.
  Account& Of(const Tenant& tenant);
  // With the limits last heard of.
  Account& Of(const std::string& tenant);

 private:
  ByteBudget& memory_;
  ByteBudget& disk_;
  std::mutex mu_;
  std::map<std::string, std::unique_ptr<Account>> accounts_;  // guarded by mu_
};

}  // namespace certiq::server

#endif  // CERTIQ_RUNTIME_TENANT_QUOTA_H_
