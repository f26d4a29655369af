// A run: one layer on its way through the queue and the engine.

#ifndef CERTIQ_JOB_RUN_H_
#define CERTIQ_JOB_RUN_H_

#include <functional>
#include <memory>
#include <optional>

#include "absl/base/thread_annotations.h"
#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "base/mutex.h"
#include "calibration/calibration_desk.h"
#include "contract/certificate.h"
#include "engine/quantize_layer.h"
#include "engine/run_context.h"
#include "runtime/throttle.h"
#include "runtime/worker_pool.h"

namespace certiq::server {

// What a run quantizes, and what its certificate will say of where that came from.
struct RunInput {
  engine::LayerProblem problem;
  // What problem.factors points to, where it does.
  std::unique_ptr<engine::FactorCache> factors;
  CertificateFacts facts;
};

// Fills in what a job takes from its calibration: sums, shared factors, and the facts of both.
// Errors are CalibrationDesk::Sums'.
absl::Status LoadCalibration(const CalibrationDesk& calibrations,
                             const CalibrationRecord& calibration, RunInput& input);

// Waits in the pool's queue, then loads, quantizes and keeps a layer on a worker. Stored jobs and
// Quantize calls differ in their steps only. Owned by std::shared_ptr: the pool keeps it while it
// waits or runs. Thread-safe.
class Run : public std::enable_shared_from_this<Run> {
 public:
  struct Steps {
    int priority = 0;
    // WorkerPool::Job::ready; null: nothing is needed to start.
    std::function<bool()> ready = nullptr;
    // On the worker: what to quantize.
    std::function<absl::StatusOr<RunInput>()> load;
    // On the worker: takes the result.
    std::function<absl::Status(engine::QuantizedLayer, const CertificateFacts&)> keep;
    // From any worker, one call at a time, no more often than somebody can read.
    std::function<void(engine::Phase, double)> progress;
    // Once, after which nothing of the run happens.
    std::function<void(const absl::Status&)> done;
  };

  // The pool outlives the run.
  Run(WorkerPool& pool, Steps steps) : pool_(pool), steps_(std::move(steps)) {}

  // Queues it. Where the pool has shut down `done` hears of it. `done` may run before this returns.
  void Start(WorkerPool::Slot slot);

  // Stops it for `reason`: at once while it waits, within a block of work while it runs. Before
  // Start it stops the run as soon as it starts. The first reason stays.
  void Cancel(absl::StatusCode reason);
  // Why it was cancelled, OK while it was not.
  absl::Status cancelled() const { return cancellation_->status(); }
  const engine::Cancellation& cancellation() const { return *cancellation_; }

 private:
  absl::Status Execute();

  WorkerPool& pool_;
  Steps steps_;
  Throttle throttle_;
  const std::shared_ptr<engine::Cancellation> cancellation_ =
      std::make_shared<engine::Cancellation>();

  base::Mutex mu_;
  std::optional<WorkerPool::JobId> id_ ABSL_GUARDED_BY(mu_);
};

}  // namespace certiq::server

#endif  // CERTIQ_JOB_RUN_H_
