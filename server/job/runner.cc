#include "job/runner.h"

#include <algorithm>
#include <chrono>
#include <cstddef>
#include <set>
#include <span>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "base/clock.h"
#include "base/id.h"
#include "base/status_macros.h"
#include "contract/enums.h"
#include "contract/resolve_spec.h"
#include "job/admission.h"
#include "job/job_report.h"
#include "job/result.h"

namespace certiq::server {
namespace {

using Clock = std::chrono::steady_clock;

// Each run for nothing costs what the first did; who makes room on a disk takes minutes.
constexpr int kRunsWithoutRoom = 4;
constexpr std::chrono::minutes kRoomPatience{10};

bool MayPassByItself(const absl::Status& status) {
  return absl::IsResourceExhausted(status) || absl::IsUnavailable(status);
}

absl::Status ReasonOf(absl::StatusCode code) {
  engine::Cancellation cancellation;
  cancellation.Cancel(code);
  return cancellation.status();
}

double Seconds(base::UnixMicros from, base::UnixMicros to) {
  return 1e-6 * static_cast<double>(to - from);
}

}  // namespace

Runner::Runner(const Environment& environment, CalibrationDesk& calibrations, JobEvents& events,
               JobHoldings& holdings, std::string replica)
    : env_(environment),
      calibrations_(calibrations),
      events_(events),
      holdings_(holdings),
      replica_(std::move(replica)),
      strand_(std::make_shared<Strand>(environment.pool)) {}

void Runner::Poke(std::optional<int32_t> priority) {
  std::shared_ptr<Run> outranked;
  bool post = false;
  {
    const base::MutexLock lock(mu_);
    if (stopped_) return;
    if (priority.has_value()) added_ = std::max(added_.value_or(*priority), *priority);
    for (const auto& [id, claimed] : claimed_) {
      if (claimed->waiting && priority.has_value() && claimed->job.priority() < *priority) {
        claimed->outranked = true;
        outranked = claimed->run;
      }
    }
    if (!posted_ && !resting_ && !room_wanted_.has_value()) post = posted_ = true;
  }
  // It is given back, and whoever is first now is claimed after it.
  if (outranked != nullptr) outranked->Cancel(absl::StatusCode::kAborted);
  if (!post) return;
  const absl::Status posted =
      strand_->Post({.run = [this] { return ClaimNext(); }, .done = [](const absl::Status&) {}});
  if (posted.ok()) return;
  const base::MutexLock lock(mu_);
  posted_ = false;
}

absl::Status Runner::ClaimNext() {
  std::set<std::string> without;
  {
    const base::MutexLock lock(mu_);
    posted_ = false;
    if (stopped_ || resting_ || room_wanted_.has_value()) return absl::OkStatus();
    for (const auto& [id, claimed] : claimed_) {
      if (claimed->waiting) return absl::OkStatus();
    }
    added_.reset();
    for (const auto& [tenant, bytes] : short_) without.insert(tenant);
  }
  // A claim whose answer was lost is repeated, so that no job stays claimed by nobody.
  if (claim_.empty()) claim_ = base::NewId("claim-");
  const absl::StatusOr<std::optional<JobRecord>> job =
      env_.storage.catalog->ClaimJob(replica_, claim_, without);
  if (!job.ok()) {
    const base::MutexLock lock(mu_);
    resting_ = true;
    return job.status();
  }
  claim_.clear();
  if (job->has_value()) Begin(**job);
  return absl::OkStatus();
}

void Runner::Begin(const JobRecord& job) {
  const auto claimed = std::make_shared<Claimed>();
  claimed->job = job;
  {
    const base::MutexLock lock(mu_);
    // It may have come too late to be claimed instead.
    claimed->outranked = added_.has_value() && job.priority() < *added_;
    claimed_[job.id()] = claimed;
  }
  WorkerPool::Slot slot = holdings_.TakeSlot(job.id());
  if (const absl::Status prepared = Prepare(*claimed); !prepared.ok()) {
    if (!MayPassByItself(prepared)) {
      End(claimed, prepared);
      return;
    }
    {
      const base::MutexLock lock(mu_);
      resting_ = true;
    }
    Release(claimed);
    return;
  }
  if (ShortOfItsOwn(*claimed)) {
    Release(claimed);
    Poke();
    return;
  }
  const std::shared_ptr<Run> run = MakeRun(claimed);
  {
    const base::MutexLock lock(mu_);
    claimed->run = run;
    if (claimed->outranked) run->Cancel(absl::StatusCode::kAborted);
  }
  // Whoever asks for its end from now on finds the run; who asked before is in the catalog.
  const absl::StatusOr<JobRecord> now = env_.storage.catalog->FindJob(job.tenant(), job.id());
  if (now.ok() && now->cancel_code() != 0) {
    run->Cancel(static_cast<absl::StatusCode>(now->cancel_code()));
  }
  if (!slot) slot = env_.pool.AdmitAgain();
  run->Start(std::move(slot));
}

absl::Status Runner::Prepare(Claimed& claimed) {
  const JobRecord& job = claimed.job;
  ASSIGN_OR_RETURN(claimed.spec, ResolveSpec(job.spec()));
  absl::StatusOr<CalibrationRecord> calibration =
      env_.storage.catalog->FindCalibration(job.tenant(), job.calibration_id());
  if (absl::IsNotFound(calibration.status())) {
    return absl::DataLossError(
        absl::StrCat("calibration ", job.calibration_id(), " is not in the store any more"));
  }
  if (!calibration.ok()) return calibration.status();
  claimed.calibration = *std::move(calibration);
  claimed.tenant = job.tenant();
  claimed.run_bytes = RunBytes(job.rows(), job.features(), claimed.spec, claimed.calibration);
  return absl::OkStatus();
}

std::shared_ptr<Run> Runner::MakeRun(const ClaimedPtr& claimed) {
  return std::make_shared<Run>(
      env_.pool,
      Run::Steps{.priority = claimed->job.priority(),
                 .ready = [this, claimed] { return Reserve(claimed); },
                 .load = [this, claimed] { return Load(claimed); },
                 .keep =
                     [this, claimed](engine::QuantizedLayer layer, const CertificateFacts& facts) {
                       return Keep(claimed, std::move(layer), facts);
                     },
                 .progress =
                     [this, claimed](engine::Phase phase, double fraction) {
                       {
                         const base::MutexLock lock(mu_);
                         claimed->progress = {phase, fraction};
                       }
                       events_.Notify(claimed->job.id());
                     },
                 .done = [this, claimed](const absl::Status& status) { Done(claimed, status); }});
}

bool Runner::ShortOfItsOwn(const Claimed& claimed) {
  if (env_.quotas.Of(claimed.tenant).memory.HasRoomOfItsOwn(claimed.run_bytes)) return false;
  const base::MutexLock lock(mu_);
  short_[claimed.tenant] = claimed.run_bytes;
  return true;
}

bool Runner::Reserve(const ClaimedPtr& claimed) {
  {
    const base::MutexLock lock(mu_);
    if (stopped_) return false;
  }
  auto reserved = env_.quotas.Of(claimed->tenant).memory.TryReserve(claimed->run_bytes, "this job");
  if (!reserved.ok()) return false;
  claimed->memory = *std::move(reserved);
  return true;
}

absl::StatusOr<RunInput> Runner::Load(const ClaimedPtr& claimed) {
  const JobRecord& job = claimed->job;
  bool outranked = false;
  {
    const base::MutexLock lock(mu_);
    outranked = claimed->outranked;
    claimed->waiting = outranked;
  }
  if (outranked) {
    claimed->run->Cancel(absl::StatusCode::kAborted);
    return claimed->run->cancelled();
  }
  absl::StatusOr<JobChange> started =
      env_.storage.catalog->StartJob(job.id(), job.claim(), base::Now());
  if (!started.ok()) {
    claimed->start_failed = MayPassByItself(started.status());
    return started.status();
  }
  claimed->job = started->job;
  {
    const base::MutexLock lock(mu_);
    claimed->progress = {engine::Phase::kFactor, 0};
  }
  events_.Changed(*started);
  if (started->job.cancel_code() != 0) {
    claimed->run->Cancel(static_cast<absl::StatusCode>(started->job.cancel_code()));
    return claimed->run->cancelled();
  }
  // Other workers may be free for the next one.
  Poke();
  RunInput input;
  input.facts.weights_sha256 = job.weights_sha256();
  input.facts.queue_seconds = Seconds(job.create_time(), job.start_time());
  env_.observer.PhaseTook(claimed->spec.method, engine::Phase::kQueue, input.facts.queue_seconds);
  RETURN_IF_ERROR(LoadCalibration(calibrations_, claimed->calibration, input));
  ASSIGN_OR_RETURN(input.problem.weights, ReadWeights(job));
  input.problem.spec = claimed->spec;
  return input;
}

absl::StatusOr<engine::StripMatrix> Runner::ReadWeights(const JobRecord& job) const {
  ASSIGN_OR_RETURN(const std::unique_ptr<BlobReader> reader,
                   env_.storage.blobs->Open(job.weights()));
  ASSIGN_OR_RETURN(const engine::DType dtype,
                   FromWire(job.weight_dtype(), kDataTypes, "weight.dtype"));
  const int64_t row_bytes = job.features() * engine::ItemSize(dtype);
  const int64_t rows_at_once = std::max<int64_t>(1, kWeightReadBytes / row_bytes);
  engine::StripMatrix weights(job.rows(), job.features());
  std::vector<std::byte> bytes;
  for (int64_t row = 0; row < job.rows(); row += rows_at_once) {
    const int64_t rows = std::min(rows_at_once, job.rows() - row);
    bytes.resize(static_cast<size_t>(rows * row_bytes));
    RETURN_IF_ERROR(reader->Read(row * row_bytes, bytes));
    RETURN_IF_ERROR(engine::DecodeRows(dtype, bytes.data(), row, rows, "weight.data", weights));
  }
  return weights;
}

absl::Status Runner::Keep(const ClaimedPtr& claimed, engine::QuantizedLayer layer,
                          const CertificateFacts& facts) {
  absl::StatusOr<ResultRecord> written = WriteResult(layer, facts, *env_.storage.blobs);
  if (absl::IsResourceExhausted(written.status())) {
    claimed->missing_bytes = DescribeResult(layer).tensor_bytes();
  }
  ASSIGN_OR_RETURN(claimed->result, std::move(written));
  claimed->certificate = std::move(layer.certificate);
  return absl::OkStatus();
}

void Runner::Done(const ClaimedPtr& claimed, const absl::Status& status) {
  claimed->memory.Release();
  const absl::StatusCode cancelled = claimed->run->cancelled().code();
  const bool asked =
      cancelled == absl::StatusCode::kCancelled || cancelled == absl::StatusCode::kDeadlineExceeded;
  const bool cut_short = !status.ok() && (cancelled == absl::StatusCode::kUnavailable ||
                                          cancelled == absl::StatusCode::kAborted);
  if (claimed->start_failed) {
    const base::MutexLock lock(mu_);
    resting_ = true;
  }
  const bool no_room = claimed->missing_bytes > 0 && cancelled == absl::StatusCode::kOk;
  if (cut_short || (claimed->start_failed && !asked) || (no_room && WaitsForRoom(*claimed))) {
    Release(claimed);
  } else if (absl::IsAborted(status) && cancelled == absl::StatusCode::kOk) {
    // The claim is not ours any more: whoever has it ends the job.
    Forget(claimed);
  } else {
    End(claimed, claimed->start_failed ? claimed->run->cancelled() : status);
  }
  Poke();
}

bool Runner::WaitsForRoom(const Claimed& claimed) {
  const base::MutexLock lock(mu_);
  const Clock::time_point now = Clock::now();
  NoRoom& found =
      no_room_.try_emplace(claimed.job.id(), NoRoom{.runs = 0, .since = now}).first->second;
  ++found.runs;
  if (found.runs >= kRunsWithoutRoom || now - found.since >= kRoomPatience) return false;
  room_wanted_ = {.bytes = claimed.missing_bytes, .until = found.since + kRoomPatience};
  return true;
}

void Runner::LookForRoom() {
  std::optional<RoomWanted> wanted;
  {
    const base::MutexLock lock(mu_);
    wanted = room_wanted_;
  }
  if (!wanted.has_value()) return;
  if (Clock::now() < wanted->until &&
      absl::IsResourceExhausted(env_.storage.blobs->HasRoom(wanted->bytes))) {
    return;
  }
  const base::MutexLock lock(mu_);
  room_wanted_.reset();
}

void Runner::Release(const ClaimedPtr& claimed) {
  // Before it is seen: a claim of it may follow at once.
  holdings_.GiveSlot(claimed->job.id(), env_.pool.AdmitAgain());
  const absl::StatusOr<JobChange> released =
      env_.storage.catalog->ReleaseJob(claimed->job.id(), claimed->job.claim());
  if (released.ok()) {
    Forget(claimed);
    events_.Changed(*released);
    const JobRecord& job = released->job;
    // Whoever asked for its end relies on who had claimed it. Nobody has it now, or the next claim
    // finds the mark.
    if (job.cancel_code() != 0 && !IsFinal(job.state())) {
      Cancel(job.tenant(), job.id(), static_cast<absl::StatusCode>(job.cancel_code()))
          .status()
          .IgnoreError();
    }
    return;
  }
  if (!MayPassByItself(released.status())) {
    Forget(claimed);
    return;
  }
  // The next tick gives it back; after a stop the next start does, as if the process had crashed.
  const base::MutexLock lock(mu_);
  claimed->waiting = false;
  claimed->retry = resting_ = true;
}

void Runner::End(const ClaimedPtr& claimed, const absl::Status& ended) {
  absl::Status status = ended;
  {
    const base::MutexLock lock(mu_);
    claimed->waiting = false;
    const auto no_room = no_room_.extract(claimed->job.id());
    if (claimed->missing_bytes > 0 && absl::IsResourceExhausted(ended)) {
      status = absl::ResourceExhaustedError(absl::StrCat(
          "the server's disk had no room for the result, in ",
          no_room.empty() ? 1 : no_room.mapped().runs,
          " runs; the job may be submitted again once there is some (", ended.message(), ")"));
    }
    claimed->outcome =
        JobOutcome{.status = status, .result = claimed->result, .end_time = base::Now()};
    if (!status.ok()) claimed->outcome->result.reset();
  }
  WriteEnd(claimed);
}

void Runner::WriteEnd(const ClaimedPtr& claimed) {
  const JobRecord& job = claimed->job;
  const JobOutcome& outcome = *claimed->outcome;
  if (!std::exchange(claimed->reported, true)) {
    // Before the end is written, so that who sees it finds it in the metrics and finds its place
    // free.
    ReportFinished(claimed->spec, outcome.status, Seconds(job.create_time(), outcome.end_time),
                   claimed->certificate.has_value() ? &*claimed->certificate : nullptr,
                   env_.observer);
    holdings_.Release(job.id());
  }
  const absl::StatusOr<JobChange> finished =
      env_.storage.catalog->FinishJob(job.id(), job.claim(), outcome);
  if (!finished.ok() && MayPassByItself(finished.status())) {
    // Until it is written the job is seen as it was; the next tick comes back to it.
    const base::MutexLock lock(mu_);
    claimed->retry = resting_ = true;
    return;
  }
  if (finished.ok()) {
    env_.storage.Forget(job.weights());
    holdings_.stored().ShrinkTo(job.id(), EndedBytes(finished->job));
    Forget(claimed);
    events_.Changed(*finished);
    if (env_.job_log) env_.job_log(finished->job, outcome.status);
    return;
  }
  // Somebody else has the job, or it is gone: the result has no record.
  if (outcome.result.has_value()) env_.storage.Forget(outcome.result->blob());
  Forget(claimed);
}

void Runner::Forget(const ClaimedPtr& claimed) {
  const base::MutexLock lock(mu_);
  // A job that was given back may have been claimed again.
  const auto found = claimed_.find(claimed->job.id());
  if (found != claimed_.end() && found->second == claimed) claimed_.erase(found);
}

absl::StatusOr<JobRecord> Runner::Cancel(const std::string& tenant, const std::string& id,
                                         absl::StatusCode reason) {
  const absl::Status why = ReasonOf(reason);
  ASSIGN_OR_RETURN(const JobChange change,
                   env_.storage.catalog->CancelJob(tenant, id, why, base::Now()));
  const JobRecord& job = change.job;
  if (!IsFinal(job.state())) {
    std::shared_ptr<Run> run;
    {
      const base::MutexLock lock(mu_);
      if (const auto found = claimed_.find(id); found != claimed_.end()) run = found->second->run;
    }
    if (run != nullptr) run->Cancel(reason);
  } else if (change.changed) {
    const engine::ResolvedSpec spec = ResolveSpec(job.spec()).value_or(engine::ResolvedSpec());
    ReportFinished(spec, why, Seconds(job.create_time(), job.end_time()), nullptr, env_.observer);
    holdings_.Release(id);
    holdings_.stored().ShrinkTo(id, EndedBytes(job));
    {
      // Nobody else waits for this room.
      const base::MutexLock lock(mu_);
      if (!no_room_.extract(id).empty()) room_wanted_.reset();
    }
    env_.storage.Forget(change.weights);
    events_.Changed(change);
    if (env_.job_log) env_.job_log(job, why);
  }
  return job;
}

std::optional<JobProgress> Runner::ProgressOf(const std::string& id) const {
  const base::MutexLock lock(mu_);
  const auto found = claimed_.find(id);
  if (found == claimed_.end()) return std::nullopt;
  return found->second->progress;
}

void Runner::Tick() {
  // In the strand: an end is written by one at a time.
  static_cast<void>(strand_->Post({.run =
                                       [this] {
                                         LookForRoom();
                                         std::vector<ClaimedPtr> unwritten;
                                         {
                                           const base::MutexLock lock(mu_);
                                           resting_ = false;
                                           for (const auto& [id, claimed] : claimed_) {
                                             if (!std::exchange(claimed->retry, false)) continue;
                                             unwritten.push_back(claimed);
                                           }
                                         }
                                         for (const ClaimedPtr& claimed : unwritten) {
                                           if (claimed->outcome.has_value()) {
                                             WriteEnd(claimed);
                                           } else {
                                             Release(claimed);
                                           }
                                         }
                                         LookAtTenants();
                                         Poke();
                                         return absl::OkStatus();
                                       },
                                   .done = [](const absl::Status&) {}}));
}

void Runner::LookAtTenants() {
  std::map<std::string, int64_t> short_of;
  ClaimedPtr waiting;
  {
    const base::MutexLock lock(mu_);
    short_of = short_;
    for (const auto& [id, claimed] : claimed_) {
      if (claimed->waiting && claimed->run != nullptr) waiting = claimed;
    }
  }
  for (const auto& [tenant, bytes] : short_of) {
    if (!env_.quotas.Of(tenant).memory.HasRoomOfItsOwn(bytes)) continue;
    const base::MutexLock lock(mu_);
    short_.erase(tenant);
  }
  // There was room when it was claimed. It is given back, and the next tenant's is claimed.
  if (waiting != nullptr && ShortOfItsOwn(*waiting)) {
    waiting->run->Cancel(absl::StatusCode::kAborted);
  }
}

void Runner::StopClaiming() {
  const base::MutexLock lock(mu_);
  stopped_ = true;
}

}  // namespace certiq::server
