// The environment of calibrations and jobs: what they work with.

#ifndef CERTIQ_CALIBRATION_ENVIRONMENT_H_
#define CERTIQ_CALIBRATION_ENVIRONMENT_H_

#include <functional>

#include "absl/status/status.h"
#include "observability/observer.h"
#include "runtime/shared_cache.h"
#include "runtime/tenant_quota.h"
#include "runtime/worker_pool.h"
#include "store/storage.h"

namespace certiq::server {

// All of it outlives them.
struct Environment {
  WorkerPool& pool;
  const Storage& storage;
  SharedCache& cache;
  TenantQuotas& quotas;
  Observer& observer;
  // Told once of every stored job that ended, and why; may be null. Does not block.
  std::function<void(const JobRecord&, const absl::Status&)> job_log = nullptr;
};

}  // namespace certiq::server

#endif  // CERTIQ_CALIBRATION_ENVIRONMENT_H_
