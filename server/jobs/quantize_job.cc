#include "jobs/quantize_job.h"

#include <utility>

#include "engine/certificate.h"
#include "engine/status.h"

namespace certiq::jobs {
namespace {

using Clock = std::chrono::steady_clock;

double SecondsSince(Clock::time_point start) {
  return std::chrono::duration<double>(Clock::now() - start).count();
}

JobState OutcomeOf(absl::StatusCode code) {
  switch (code) {
    case absl::StatusCode::kOk:
      return JobState::kSucceeded;
    case absl::StatusCode::kCancelled:
      return JobState::kCancelled;
    case absl::StatusCode::kDeadlineExceeded:
      return JobState::kExpired;
    default:
      return JobState::kFailed;
  }
}

int64_t BytesOf(const engine::QuantizedLayer& layer) {
  // Two doubles a row here, and two again as messages.
  int64_t bytes = 32 * layer.certificate.rows;
  for (const engine::ResultTensor& tensor : layer.tensors) {
    bytes += static_cast<int64_t>(tensor.bytes.size());
  }
  return bytes;
}

}  // namespace

QuantizeJob::QuantizeJob(WorkerPool& pool, Observer& observer, ReadyLayer layer, Options options)
    : pool_(pool),
      observer_(observer),
      method_(layer.problem.spec.method),
      max_attempts_(layer.problem.spec.max_attempts),
      layer_(std::move(layer)),
      options_(std::move(options)),
      cancellation_(std::make_shared<engine::Cancellation>()) {}

void QuantizeJob::Start(WorkerPool::Slot slot) {
  queued_at_ = Clock::now();
  observer_.JobEntered(JobState::kQueued);
  const std::shared_ptr<QuantizeJob> self = shared_from_this();
  absl::StatusOr<WorkerPool::JobId> id = pool_.Enqueue(
      std::move(slot), {.priority = options_.priority,
                        .cancellation = cancellation_,
                        .run = [self] { return self->Run(); },
                        .done = [self](absl::Status status) { self->Finish(std::move(status)); }});
  if (!id.ok()) {
    Finish(id.status());
    return;
  }
  bool cancelled = false;
  {
    const std::lock_guard lock(mu_);
    id_ = *id;
    cancelled = cancellation_->cancelled();
  }
  // Cancel came before there was an id.
  if (cancelled) pool_.Cancel(*id, cancellation_->status().code());
}

void QuantizeJob::Cancel(absl::StatusCode reason) {
  std::optional<WorkerPool::JobId> id;
  {
    const std::lock_guard lock(mu_);
    cancellation_->Cancel(reason);
    id = id_;
  }
  if (id.has_value()) pool_.Cancel(*id, reason);
}

absl::Status QuantizeJob::Run() {
  const double queue_seconds = SecondsSince(queued_at_);
  state_ = JobState::kRunning;
  observer_.JobLeft(JobState::kQueued);
  observer_.JobEntered(JobState::kRunning);
  observer_.PhaseTook(method_, engine::Phase::kQueue, queue_seconds);

  const engine::RunContext context{
      .executor = &pool_, .cancellation = cancellation_.get(), .progress = options_.progress};
  absl::StatusOr<engine::QuantizedLayer> quantized =
      engine::QuantizeLayer(std::move(layer_->problem), context);
  if (!quantized.ok()) return quantized.status();

  QuantizeResult result;
  result.layer = *std::move(quantized);
  result.queue_seconds = queue_seconds;
  result.reservation = std::move(layer_->reservation);
  result.reservation.ShrinkTo(BytesOf(result.layer));
  result_ = std::move(result);
  return absl::OkStatus();
}

void QuantizeJob::Finish(absl::Status status) {
  // Gives the inputs and their bytes back before anybody hears that the job ended.
  layer_.reset();
  observer_.JobLeft(state_);
  const engine::LayerCertificate* certificate = status.ok() ? &result_->layer.certificate : nullptr;
  if (certificate != nullptr) {
    const engine::EngineSeconds& seconds = certificate->seconds;
    observer_.PhaseTook(method_, engine::Phase::kFactor, seconds.factor);
    observer_.PhaseTook(method_, engine::Phase::kRound, seconds.round);
    observer_.PhaseTook(method_, engine::Phase::kCertify, seconds.certify);
    observer_.PhaseTook(method_, engine::Phase::kReference, seconds.reference);
    observer_.PhaseTook(method_, engine::Phase::kPack, seconds.pack);
    for (const engine::DampingAttempt& attempt : certificate->damping_attempts) {
      if (attempt.cause != engine::StabilityCause::kNone) {
        observer_.StabilityFailed(method_, attempt.cause);
      }
    }
  } else if (const auto precondition = engine::PreconditionOf(status);
             precondition.has_value() && precondition->type == "DAMPING") {
    // Every attempt failed. The status carries the causes for people only.
    for (int32_t i = 0; i < max_attempts_; ++i) {
      observer_.StabilityFailed(method_, std::nullopt);
    }
  }
  observer_.JobFinished(method_, OutcomeOf(status.code()), certificate);

  // Completions may hold this job: let go of them with the last call.
  const auto done = std::exchange(options_.done, nullptr);
  options_.progress = nullptr;
  if (status.ok()) {
    done(*std::exchange(result_, std::nullopt));
  } else {
    done(std::move(status));
  }
}

}  // namespace certiq::jobs
