#include "runtime/tenant_quota.h"

#include "absl/strings/str_cat.h"
#include "base/status.h"

namespace certiq::server {

void CountQuota::SetLimit(int64_t limit) {
  const std::lock_guard lock(mu_);
  limit_ = limit;
}

absl::StatusOr<CountQuota::Place> CountQuota::Take(absl::string_view what) {
  const std::lock_guard lock(mu_);
  if (taken_ >= limit_) {
    absl::Status status = absl::ResourceExhaustedError(
        absl::StrCat("all ", limit_, " ", what, " that this tenant may have are taken"));
    if (limit_ > 0) base::SetRetryAfter(status, base::kRetrySoon);
    return status;
  }
  ++taken_;
  return Place(this);
}

CountQuota::Place CountQuota::TakeAnyway() {
  const std::lock_guard lock(mu_);
  ++taken_;
  return Place(this);
}

void CountQuota::Give() {
  const std::lock_guard lock(mu_);
  --taken_;
}

Account& Accounts::Of(const std::string& tenant) {
  const std::lock_guard lock(mu_);
  std::unique_ptr<Account>& account = accounts_[tenant];
  if (account == nullptr) account = std::make_unique<Account>(memory_, disk_);
  return *account;
}

Account& Accounts::Of(const Tenant& tenant) {
  Account& account = Of(tenant.name);
  account.memory.SetCapacity(tenant.limits.memory_bytes);
  account.disk.SetCapacity(tenant.limits.disk_bytes);
  account.jobs.SetLimit(tenant.limits.jobs);
  account.streams.SetLimit(tenant.limits.streams);
  return account;
}

}  // namespace certiq::server
