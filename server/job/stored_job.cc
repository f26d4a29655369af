#include "job/stored_job.h"

#include <algorithm>
#include <utility>

#include "absl/strings/str_cat.h"
#include "base/clock.h"
#include "base/status.h"
#include "job/job_report.h"

namespace certiq::server {
namespace {

// Of a header, a certificate without rows, and lengths.
constexpr int64_t kSmallChange = int64_t{1} << 20;
constexpr int64_t kRecordBytes = 4096;

bool MayPassByItself(absl::StatusCode code) {
  return code == absl::StatusCode::kResourceExhausted || code == absl::StatusCode::kUnavailable;
}

}  // namespace

StoredJob::StoredJob(const Environment& environment, const Codec& codec, JobRecord record,
                     engine::ResolvedSpec spec, Holdings holdings, Keeps keeps)
    : env_(environment),
      codec_(codec),
      id_(record.id),
      tenant_(record.tenant),
      spec_(std::move(spec)),
      record_(std::move(record)),
      holdings_(std::move(holdings)),
      keeps_(std::move(keeps)) {
  env_.observer.JobEntered(record_.state);
}

StoredJob::StoredJob(const Environment& environment, const Codec& codec, JobRecord record,
                     Keeps keeps)
    : StoredJob(environment, codec, std::move(record), {}, {}, std::move(keeps)) {}

int64_t StoredJob::StoredBytes(const JobRecord& record, const engine::ResolvedSpec& spec) {
  const int64_t weights = record.rows * record.features;
  const int64_t item = engine::ItemSize(static_cast<engine::DType>(record.weight_dtype));
  // Levels in float32 are the widest result; two doubles a row in the certificate, with tags.
  return weights * (item + 4) + record.rows * spec.Groups(record.features) * 8 +
         record.features * 4 + record.rows * 24 + kSmallChange;
}

int64_t StoredJob::RecordBytes(const JobRecord& record) {
  // Once as it came and once as it was understood; names, digests, tables.
  return 2 * static_cast<int64_t>(record.spec.size()) + kRecordBytes;
}

int64_t StoredJob::PeakBytes(const JobRecord& record, const engine::ResolvedSpec& spec,
                             const CalibrationRecord& calibration) {
  return engine::PeakBytes(spec, record.rows, record.features, calibration.mismatched,
                           calibration.held_out_fraction > 0) +
         kWeightReadBytes;
}

JobView StoredJob::View() const {
  JobView view;
  std::optional<WorkerPool::JobId> id;
  {
    const std::lock_guard lock(mu_);
    view.record = record_;
    view.phase = phase_;
    view.fraction = fraction_;
    id = pool_id_;
  }
  if (id.has_value() && view.record.state == JobState::kQueued) {
    view.queue_position = env_.pool.Position(*id);
  }
  return view;
}

bool StoredJob::ended() const {
  const std::lock_guard lock(mu_);
  return IsFinal(record_.state);
}

bool StoredJob::Expired(base::UnixMicros now) const {
  const std::lock_guard lock(mu_);
  return IsFinal(record_.state) && now >= record_.end_time + record_.ttl_micros;
}

bool StoredJob::PastDeadline(base::UnixMicros now) const {
  const std::lock_guard lock(mu_);
  return !IsFinal(record_.state) && !unwritten_.has_value() && record_.deadline_time != 0 &&
         now >= record_.deadline_time;
}

void StoredJob::Watch(const std::shared_ptr<base::Listener>& listener) {
  const std::lock_guard lock(mu_);
  listeners_.insert(listener);
}

void StoredJob::Unwatch(const std::shared_ptr<base::Listener>& listener) {
  const std::lock_guard lock(mu_);
  listeners_.erase(listener);
}

void StoredJob::NotifyAll() {
  std::set<std::shared_ptr<base::Listener>> listeners;
  {
    const std::lock_guard lock(mu_);
    listeners = listeners_;
  }
  for (const auto& listener : listeners) listener->Notify();
}

absl::Status StoredJob::Publish(JobRecord next) {
  absl::Status put = env_.store.PutJob(next);
  if (put.ok()) Show(std::move(next));
  return put;
}

void StoredJob::Show(JobRecord next) {
  {
    const std::lock_guard lock(mu_);
    env_.observer.JobLeft(record_.state);
    env_.observer.JobEntered(next.state);
    record_ = std::move(next);
  }
  NotifyAll();
}

void StoredJob::Start(WorkerPool::Slot slot, const std::atomic<bool>& hold) {
  hold_ = &hold;
  Enqueue(std::move(slot));
}

void StoredJob::Enqueue(WorkerPool::Slot slot) {
  const std::shared_ptr<StoredJob> self = shared_from_this();
  absl::StatusOr<WorkerPool::JobId> id = env_.pool.Enqueue(
      std::move(slot), {.priority = record_.priority,
                        .cancellation = cancellation_,
                        .ready = [self] { return self->Ready(); },
                        .run = [self] { return self->Run(); },
                        .done = [self](const absl::Status& status) { self->Done(status); }});
  // After a shutdown it stays queued in the store.
  if (!id.ok()) return;
  {
    const std::lock_guard lock(mu_);
    pool_id_ = *id;
  }
  if (cancellation_->cancelled()) env_.pool.Cancel(*id, cancellation_->status().code());
}

bool StoredJob::Ready() {
  if (*hold_) return false;
  const std::lock_guard lock(mu_);
  const CalibrationView calibration = holdings_.calibration->View(false);
  auto reserved = env_.accounts.Of(tenant_).memory.TryReserve(
      PeakBytes(record_, spec_, calibration.record), "this job");
  if (!reserved.ok()) return false;
  memory_ = *std::move(reserved);
  return true;
}

void StoredJob::Cancel(absl::StatusCode reason) {
  std::optional<WorkerPool::JobId> id;
  bool waits_for_disk = false;
  cancellation_->Cancel(reason);
  {
    const std::lock_guard lock(mu_);
    if (IsFinal(record_.state)) return;
    id = pool_id_;
    waits_for_disk = std::exchange(start_again_, false);
  }
  if (waits_for_disk) {
    End(cancellation_->status());
  } else if (id.has_value()) {
    env_.pool.Cancel(*id, reason);
  }
}

absl::Status StoredJob::Run() {
  JobRecord record;
  {
    const std::lock_guard lock(mu_);
    record = record_;
    phase_ = engine::Phase::kFactor;
    fraction_ = 0;
  }
  record.state = JobState::kRunning;
  record.start_time = base::Now();
  ++record.starts;
  const double queue_seconds = 1e-6 * static_cast<double>(record.start_time - record.create_time);
  if (absl::Status published = Publish(record); !published.ok()) {
    start_failed_ = MayPassByItself(published.code());
    return published;
  }
  env_.observer.PhaseTook(spec_.method, engine::Phase::kQueue, queue_seconds);
  CallFacts facts;
  facts.weights_sha256 = record.weights_sha256;
  facts.queue_seconds = queue_seconds;
  absl::StatusOr<engine::QuantizedLayer> layer = Quantize(record, facts);
  if (!layer.ok()) return layer.status();
  if (absl::Status written = WriteResult(*layer, facts, record); !written.ok()) return written;
  certificate_ = std::move(layer->certificate);
  finished_ = std::move(record);
  return absl::OkStatus();
}

void StoredJob::Done(const absl::Status& status) {
  memory_.Release();
  absl::Status outcome = status;
  {
    const std::lock_guard lock(mu_);
    pool_id_.reset();
    if (std::exchange(start_failed_, false)) {
      // Under the lock, as in Cancel: one of the two sees the other.
      start_again_ = !cancellation_->cancelled();
      // Not before: whoever starts it again must not meet this run.
      if (start_again_) return;
      outcome = cancellation_->status();
    }
  }
  if (!outcome.ok() && cancellation_->status().code() == absl::StatusCode::kUnavailable) {
    LeaveQueued();
  } else {
    End(outcome);
  }
}

void StoredJob::LeaveQueued() {
  JobRecord record;
  {
    const std::lock_guard lock(mu_);
    if (record_.state != JobState::kRunning) return;
    record = record_;
  }
  // It did not crash. Where this cannot be written it counts as if it had.
  record.state = JobState::kQueued;
  --record.starts;
  static_cast<void>(Publish(std::move(record)));
}

void StoredJob::End(const absl::Status& status) {
  JobRecord next;
  {
    const std::lock_guard lock(mu_);
    next = record_;
  }
  if (status.ok()) next = *std::exchange(finished_, std::nullopt);
  next.state = OutcomeOf(status.code());
  next.end_time = base::Now();
  next.weights = BlobRef();
  if (!status.ok()) next.error = codec_.EncodeError(status);
  {
    const std::lock_guard lock(mu_);
    unwritten_ = std::move(next);
    outcome_ = status;
  }
  WriteEnd();
}

void StoredJob::WriteEnd() {
  JobRecord next;
  BlobRef weights;
  {
    const std::lock_guard lock(mu_);
    if (!unwritten_.has_value()) return;
    // Taken out, so that nobody else writes it too.
    next = *std::exchange(unwritten_, std::nullopt);
    weights = record_.weights;
  }
  if (!env_.store.PutJob(next).ok()) {
    // Until it is written it is seen as it was; Retry comes back to it.
    const std::lock_guard lock(mu_);
    unwritten_ = std::move(next);
    return;
  }
  if (!weights.empty()) env_.store.DeleteBlob(weights);
  absl::Status outcome;
  std::optional<engine::LayerCertificate> certificate;
  {
    // Given back before anybody sees the end: who does may delete the calibration at once.
    Holdings holdings;
    const std::lock_guard lock(mu_);
    outcome = outcome_;
    certificate = std::exchange(certificate_, std::nullopt);
    std::swap(holdings, holdings_);
    keeps_.stored.ShrinkTo(next.result.bytes);
  }
  // Counted first, so that who sees the end finds it in the metrics.
  ReportFinished(spec_, outcome, 1e-6 * static_cast<double>(next.end_time - next.create_time),
                 certificate.has_value() ? &*certificate : nullptr, env_.observer);
  Show(next);
  if (env_.job_log) env_.job_log(next, outcome);
}

void StoredJob::Retry() {
  bool start = false;
  {
    const std::lock_guard lock(mu_);
    start = std::exchange(start_again_, false);
  }
  if (start) {
    Enqueue(env_.pool.AdmitAgain());
  } else {
    WriteEnd();
  }
}

absl::Status StoredJob::Remove() {
  if (absl::Status gone = env_.store.DeleteJob(id_); !gone.ok()) return gone;
  BlobRef result;
  {
    const std::lock_guard lock(mu_);
    env_.observer.JobLeft(record_.state);
    result = record_.result;
    keeps_ = {};
  }
  if (!result.empty()) env_.store.DeleteBlob(result);
  return absl::OkStatus();
}

}  // namespace certiq::server
