// Whose calibrations and jobs they are.

#ifndef CERTIQ_RUNTIME_TENANT_H_
#define CERTIQ_RUNTIME_TENANT_H_

#include <cstdint>
#include <limits>
#include <string>

namespace certiq::server {

inline constexpr int64_t kNoLimit = std::numeric_limits<int64_t>::max();

// Shares of the server that one tenant may hold at a time.
struct TenantLimits {
  int64_t memory_bytes = kNoLimit;
  int64_t disk_bytes = kNoLimit;
  // Jobs that have not ended, Quantize calls among them.
  int64_t jobs = kNoLimit;
  // Open Accumulate and ImportStatistics calls.
  int64_t streams = kNoLimit;

  bool operator==(const TenantLimits&) const = default;
};

// Owner of what a call makes, and all that it sees. Without tokens everyone is the tenant "".
struct Tenant {
  std::string name;
  TenantLimits limits;
};

}  // namespace certiq::server

#endif  // CERTIQ_RUNTIME_TENANT_H_
