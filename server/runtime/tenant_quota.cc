#include "runtime/tenant_quota.h"

#include "absl/strings/str_cat.h"
#include "base/status.h"

namespace certiq::server {

void CountQuota::SetLimit(int64_t limit) {
  const base::MutexLock lock(mu_);
  limit_ = limit;
}

absl::StatusOr<CountQuota::Permit> CountQuota::Take(absl::string_view what) {
  const base::MutexLock lock(mu_);
  if (taken_ >= limit_) {
    absl::Status status = absl::ResourceExhaustedError(
        absl::StrCat("all ", limit_, " ", what, " that this tenant may have are taken"));
    if (limit_ > 0) base::SetRetryAfter(status, base::kRetrySoon);
    return status;
  }
  ++taken_;
  return Permit(this);
}

CountQuota::Permit CountQuota::TakeUnchecked() {
  const base::MutexLock lock(mu_);
  ++taken_;
  return Permit(this);
}

void CountQuota::Give() {
  const base::MutexLock lock(mu_);
  --taken_;
}

TenantQuota& TenantQuotas::Of(const std::string& tenant) {
  const base::MutexLock lock(mu_);
  std::unique_ptr<TenantQuota>& quota = quotas_[tenant];
  if (quota == nullptr) quota = std::make_unique<TenantQuota>(memory_, disk_);
  return *quota;
}

TenantQuota& TenantQuotas::Of(const Tenant& tenant) {
  TenantQuota& quota = Of(tenant.name);
  quota.memory.SetCapacity(tenant.limits.memory_bytes);
  quota.disk.SetCapacity(tenant.limits.disk_bytes);
  quota.jobs.SetLimit(tenant.limits.jobs);
  quota.streams.SetLimit(tenant.limits.streams);
  return quota;
}

}  // namespace certiq::server
