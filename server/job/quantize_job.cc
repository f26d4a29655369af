#include "job/quantize_job.h"

#include <utility>

#include "job/job_report.h"

namespace certiq::server {
namespace {

using Clock = std::chrono::steady_clock;

double SecondsSince(Clock::time_point start) {
  return std::chrono::duration<double>(Clock::now() - start).count();
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
      spec_(layer.problem.spec),
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
  observer_.PhaseTook(spec_.method, engine::Phase::kQueue, queue_seconds);

  const engine::RunContext context{
      .executor = &pool_, .cancellation = cancellation_.get(), .progress = options_.progress};
  std::unique_ptr<engine::FactorCache> factors;
  if (layer_->calibration.has_value()) {
    const absl::StatusOr<CalibrationSums> sums = (*layer_->calibration)->Sums();
    if (!sums.ok()) return sums.status();
    factors = (*layer_->calibration)->Factors();
    layer_->problem.statistics = sums->fit;
    layer_->problem.held_out = sums->held_out;
    layer_->problem.factors = factors.get();
  }
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
  ReportFinished(spec_, status, SecondsSince(queued_at_),
                 status.ok() ? &result_->layer.certificate : nullptr, observer_);

  // Completions may hold this job: let go of them with the last call.
  const auto done = std::exchange(options_.done, nullptr);
  options_.progress = nullptr;
  if (status.ok()) {
    done(*std::exchange(result_, std::nullopt));
  } else {
    done(std::move(status));
  }
}

}  // namespace certiq::server
