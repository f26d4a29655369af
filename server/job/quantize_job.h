// One layer on its way through the queue and the engine.

#ifndef CERTIQ_JOB_QUANTIZE_JOB_H_
#define CERTIQ_JOB_QUANTIZE_JOB_H_

#include <chrono>
#include <cstdint>
#include <functional>
#include <memory>
#include <mutex>
#include <optional>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "engine/quantize_layer.h"
#include "engine/run_context.h"
#include "job/layer_intake.h"
#include "observability/observer.h"
#include "runtime/worker_pool.h"

namespace certiq::server {

// What became of a job that succeeded. The reservation covers the result.
struct QuantizeResult {
  engine::QuantizedLayer layer;
  double queue_seconds = 0;
  ByteBudget::Reservation reservation;
};

// The life of a job: created, started (QUEUED), taken by a worker (RUNNING), and one of the
// final states; it tells the observer about each. Owned by std::shared_ptr: the
// pool keeps it while it is queued or runs. Thread-safe.
class QuantizeJob : public std::enable_shared_from_this<QuantizeJob> {
 public:
  struct Options {
    int priority = 0;
    // From any worker, one call at a time.
    std::function<void(engine::Phase, double)> progress;
    // Once, after which nothing of the job runs.
    std::function<void(absl::StatusOr<QuantizeResult>)> done;
  };

  // The pool and the observer outlive the job.
  QuantizeJob(WorkerPool& pool, Observer& observer, ReadyLayer layer, Options options);

  // Queues it in a place that WorkerPool::Admit gave. `done` may run before this returns.
  void Start(WorkerPool::Slot slot);

  // Stops it for `reason`, CANCELLED or DEADLINE_EXCEEDED: at once while it waits, within a block
  // of work while it runs. Before Start it stops the job as soon as it starts.
  void Cancel(absl::StatusCode reason);

 private:
  absl::Status Run();
  void Finish(absl::Status status);

  WorkerPool& pool_;
  Observer& observer_;
  const engine::ResolvedSpec spec_;
  // The engine consumes it.
  std::optional<ReadyLayer> layer_;
  Options options_;
  const std::shared_ptr<engine::Cancellation> cancellation_;
  std::chrono::steady_clock::time_point queued_at_;
  JobState state_ = JobState::kQueued;  // changed by whoever runs or finishes it, never two
  std::optional<QuantizeResult> result_;

  std::mutex mu_;
  std::optional<WorkerPool::JobId> id_;  // guarded by mu_
};

}  // namespace certiq::server

#endif  // CERTIQ_JOB_QUANTIZE_JOB_H_
