// The budget of calls with one answer.

#ifndef CERTIQ_RPC_CALLS_CALL_BUDGET_H_
#define CERTIQ_RPC_CALLS_CALL_BUDGET_H_

#include <cstdint>
#include <map>
#include <memory>
#include <string>

#include "absl/status/statusor.h"
#include "base/mutex.h"
#include "runtime/byte_budget.h"

namespace certiq::server {

// What requests and answers of short calls may hold, beside the budget of layers: a tenant that has
// used up its memory can still look, cancel and delete. Each tenant has half of it at most, so that
// answers which one does not read leave room for others. Thread-safe; outlives its reservations.
class CallBudget {
 public:
  explicit CallBudget(int64_t bytes) : whole_(bytes), share_(bytes / 2) {}

  // RESOURCE_EXHAUSTED with a retry delay where the bytes do not fit.
  absl::StatusOr<ByteBudget::Reservation> Take(const std::string& tenant, int64_t bytes)
      ABSL_LOCKS_EXCLUDED(mu_) {
    ByteBudget* budget = nullptr;
    {
      const base::MutexLock lock(mu_);
      std::unique_ptr<ByteBudget>& own = tenants_[tenant];
      if (own == nullptr) {
        own = std::make_unique<ByteBudget>(share_, whole_, "this tenant's open calls");
      }
      budget = own.get();
    }
    return budget->TryReserve(bytes, "this call");
  }

 private:
  ByteBudget whole_;
  const int64_t share_;
  base::Mutex mu_;
  // One that was made is kept: there are no more than tenants.
  std::map<std::string, std::unique_ptr<ByteBudget>> tenants_ ABSL_GUARDED_BY(mu_);
};

}  // namespace certiq::server

#endif  // CERTIQ_RPC_CALLS_CALL_BUDGET_H_
