// The backend: everything behind the calls, wired together.

#ifndef CERTIQ_BACKEND_H_
#define CERTIQ_BACKEND_H_

#include <chrono>
#include <cstdint>
#include <functional>
#include <memory>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "calibration/calibration_desk.h"
#include "calibration/environment.h"
#include "job/job_desk.h"
#include "observability/observer.h"
#include "runtime/byte_budget.h"
#include "runtime/periodic_task.h"
#include "runtime/shared_cache.h"
#include "runtime/tenant_quota.h"
#include "runtime/worker_pool.h"
#include "store/storage.h"

namespace certiq::server {

// Owns budgets, threads and desks. Thread-safe.
class Backend {
 public:
  struct Options {
    int workers = 1;
    int queue_limit = 256;
    int64_t memory_bytes = 0;
    int64_t disk_bytes = kNoLimit;
    // The part of memory_bytes that sums and factors may keep which nobody uses at the moment.
    int64_t cache_bytes = 0;
    // How long received rows may wait to become durable.
    std::chrono::milliseconds commit_interval{5000};
    // The time between two looks at deadlines, ends and times to live.
    std::chrono::milliseconds tick_interval{200};
    // Outlives the backend.
    Observer* observer = &IgnoreEvents();
    // See Environment.
    std::function<void(const JobRecord&, const absl::Status&)> job_log = nullptr;
  };

  // Registers this process in the catalog, which fences the one that had it before, and takes up
  // what is there. Errors are the store's.
  static absl::StatusOr<std::unique_ptr<Backend>> Start(const Options& options, Storage storage);
  ~Backend();
  Backend(const Backend&) = delete;
  Backend& operator=(const Backend&) = delete;

  // No more jobs are taken or started; what waits stays in the catalog.
  void StopStarting();
  // Waits until nothing runs; false if `deadline` or Hurry came first.
  bool WaitRunning(std::chrono::steady_clock::time_point deadline);
  // Ends what runs: stored jobs start again with the next server. Ends a WaitRunning.
  void Hurry() { pool_.Shutdown(); }

  ByteBudget& memory() { return memory_; }
  WorkerPool& pool() { return pool_; }
  CalibrationDesk& calibrations() { return calibrations_; }
  JobDesk& jobs() { return jobs_; }
  const Environment& environment() const { return environment_; }
  bool durable() const { return storage_.catalog->durable(); }

 private:
  Backend(const Options& options, Storage storage, std::string replica);

  const Storage storage_;
  ByteBudget memory_;
  ByteBudget disk_;
  WorkerPool pool_;
  SharedCache cache_;
  TenantQuotas quotas_;
  const Environment environment_;
  CalibrationDesk calibrations_;
  JobDesk jobs_;
  PeriodicTask periodic_task_;
};

}  // namespace certiq::server

#endif  // CERTIQ_BACKEND_H_
