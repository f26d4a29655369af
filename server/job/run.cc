#include "job/run.h"

#include <algorithm>
#include <utility>

#include "base/status_macros.h"

namespace certiq::server {

absl::Status LoadCalibration(const CalibrationDesk& calibrations,
                             const CalibrationRecord& calibration, RunInput& input) {
  input.facts.calibration_id = calibration.id();
  input.problem.calibration = calibration.id();
  input.facts.sums_sha256 = calibration.sums_sha256();
  input.facts.held_out_fraction = calibration.held_out_fraction();
  input.facts.held_out_block_rows = calibration.held_out_block_rows();
  ASSIGN_OR_RETURN(SplitSums sums, calibrations.Sums(calibration));
  input.problem.statistics = std::move(sums.fit);
  input.problem.held_out = std::move(sums.held_out);
  input.factors = calibrations.Factors(calibration);
  return absl::OkStatus();
}

void Run::Start(WorkerPool::Slot slot) {
  const std::shared_ptr<Run> self = shared_from_this();
  // What the steps hold goes with the last call.
  const auto done = [self](const absl::Status& status) {
    const Steps steps = std::exchange(self->steps_, Steps());
    steps.done(status);
  };
  const absl::StatusOr<WorkerPool::JobId> id =
      pool_.Enqueue(std::move(slot), {.priority = steps_.priority,
                                      .cancellation = cancellation_,
                                      .ready = steps_.ready,
                                      .run = [self] { return self->Execute(); },
                                      .done = done});
  if (!id.ok()) {
    // The pool has shut down, which ends the run as it ends those that are queued: a reason of its
    // own that came before stays.
    cancellation_->Cancel(id.status().code());
    const absl::Status reason = cancellation_->status();
    done(reason.code() == id.status().code() ? id.status() : reason);
    return;
  }
  bool cancelled = false;
  {
    const base::MutexLock lock(mu_);
    id_ = *id;
    cancelled = cancellation_->cancelled();
  }
  // Cancel came before there was an id.
  if (cancelled) pool_.Cancel(*id, cancellation_->status().code());
}

void Run::Cancel(absl::StatusCode reason) {
  std::optional<WorkerPool::JobId> id;
  {
    const base::MutexLock lock(mu_);
    cancellation_->Cancel(reason);
    id = id_;
  }
  if (id.has_value()) pool_.Cancel(*id, reason);
}

absl::Status Run::Execute() {
  ASSIGN_OR_RETURN(RunInput input, steps_.load());
  const engine::RunContext context{.executor = &pool_,
                                   .cancellation = cancellation_.get(),
                                   .progress = [this](engine::Phase phase, double fraction) {
                                     if (throttle_.Allow(phase))
                                       steps_.progress(phase, std::clamp(fraction, 0.0, 1.0));
                                   }};
  input.problem.factors = input.factors.get();
  ASSIGN_OR_RETURN(engine::QuantizedLayer layer,
                   engine::QuantizeLayer(std::move(input.problem), context));
  return steps_.keep(std::move(layer), input.facts);
}

}  // namespace certiq::server
