// Tenant: the owner of calibrations and jobs, and its limits.

#ifndef CERTIQ_RUNTIME_TENANT_H_
#define CERTIQ_RUNTIME_TENANT_H_

#include <cstdint>
#include <limits>
#include <string>

namespace certiq::server {

inline constexpr int64_t kNoLimit = std::numeric_limits<int64_t>::max();

// Limits on what one tenant holds at a time.
struct TenantLimits {
  int64_t memory_bytes = kNoLimit;
  int64_t disk_bytes = kNoLimit;
  // Jobs that have not ended; a Quantize call is one.
  int64_t jobs = kNoLimit;
  // Open Accumulate and ImportStatistics calls.
  int64_t streams = kNoLimit;

  bool operator==(const TenantLimits&) const = default;
};

// A call creates resources for its tenant and sees no others. Without a token file every call is of
// the tenant "".
struct Tenant {
  std::string name;
  TenantLimits limits;
};

}  // namespace certiq::server

#endif  // CERTIQ_RUNTIME_TENANT_H_
