// Everything behind the calls, wired together.

#ifndef CERTIQ_BACKEND_H_
#define CERTIQ_BACKEND_H_

#include <chrono>
#include <cstdint>
#include <memory>
#include <mutex>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "calibration/calibration_registry.h"
#include "job/codec.h"
#include "job/job_manager.h"
#include "observability/observer.h"
#include "runtime/byte_budget.h"
#include "runtime/periodic_task.h"
#include "runtime/shared_cache.h"
#include "runtime/tenant_quota.h"
#include "runtime/worker_pool.h"
#include "store/store.h"

namespace certiq::server {

// Owns budgets, threads, calibrations and jobs. Thread-safe.
class Backend {
 public:
  struct Options {
    int workers = 1;
    int queue_limit = 256;
    int64_t memory_bytes = 0;
    int64_t disk_bytes = kNoLimit;
    // Of memory_bytes, what sums and factors that nobody uses at the moment may keep.
    int64_t cache_bytes = 0;
    // How long received rows may wait to become durable.
    std::chrono::milliseconds commit_interval{5000};
    // Of looking at deadlines, ends and times to live.
    std::chrono::milliseconds tick_interval{200};
    // Outlives the backend.
    Observer* observer = &IgnoreEvents();
    // See Environment.
    std::function<void(const JobRecord&, const absl::Status&)> job_log = nullptr;
  };

  // Takes up what the store holds. Errors are the store's.
  static absl::StatusOr<std::unique_ptr<Backend>> Start(const Options& options,
                                                        std::unique_ptr<Store> store,
                                                        std::unique_ptr<const Codec> codec);
  ~Backend();
  Backend(const Backend&) = delete;
  Backend& operator=(const Backend&) = delete;

  // No more jobs are taken or started; what waits stays in the store.
  void StopStarting() { manager_.StopStarting(); }
  // Waits until nothing runs; false if `deadline` or Hurry came first.
  bool WaitRunning(std::chrono::steady_clock::time_point deadline);
  // Ends what runs: stored jobs start again with the next server. Ends a WaitRunning.
  void Hurry() { pool_.Shutdown(); }

  ByteBudget& memory() { return memory_; }
  WorkerPool& pool() { return pool_; }
  Calibrations& calibrations() { return calibrations_; }
  JobManager& manager() { return manager_; }
  const Environment& environment() const { return environment_; }
  bool durable() const { return store_->durable(); }

 private:
  Backend(const Options& options, std::unique_ptr<Store> store, std::unique_ptr<const Codec> codec);

  const std::unique_ptr<Store> store_;
  const std::unique_ptr<const Codec> codec_;
  ByteBudget memory_;
  ByteBudget disk_;
  WorkerPool pool_;
  SharedCache cache_;
  Accounts accounts_;
  const Environment environment_;
  Calibrations calibrations_;
  JobManager manager_;
  Housekeeper housekeeper_;
};

}  // namespace certiq::server

#endif  // CERTIQ_BACKEND_H_
