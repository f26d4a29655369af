#include "store/transitions.h"

#include <utility>

#include "absl/strings/str_cat.h"
#include "base/status.h"
#include "base/status_macros.h"
#include "contract/rpc_status.h"

namespace certiq::server {
namespace {

absl::Status CheckClaim(const JobRecord& job, const std::string& claim) {
  if (!IsFinal(job.state()) && !claim.empty() && job.claim() == claim) return absl::OkStatus();
  return absl::AbortedError(absl::StrCat("job ", job.id(), " is claimed by somebody else"));
}

JobRecord Ended(JobRecord job, const JobOutcome& outcome) {
  job.set_state(StateOf(outcome.status.code()));
  job.set_end_time(outcome.end_time);
  job.clear_weights();
  job.clear_owner();
  job.clear_cancel_code();
  if (!outcome.status.ok()) *job.mutable_error() = ToRpcStatus(outcome.status);
  if (outcome.result.has_value()) *job.mutable_result() = *outcome.result;
  return job;
}

}  // namespace

JobState StateOf(absl::StatusCode code) {
  switch (code) {
    case absl::StatusCode::kOk:
      return v1::JOB_STATE_SUCCEEDED;
    case absl::StatusCode::kCancelled:
      return v1::JOB_STATE_CANCELLED;
    case absl::StatusCode::kDeadlineExceeded:
      return v1::JOB_STATE_EXPIRED;
    default:
      return v1::JOB_STATE_FAILED;
  }
}

absl::StatusOr<JobRecord> Claim(JobRecord job, const std::string& replica,
                                const std::string& claim) {
  const bool free = job.state() == v1::JOB_STATE_QUEUED && job.owner().empty();
  if (!free) RETURN_IF_ERROR(CheckClaim(job, claim));
  job.set_owner(replica);
  job.set_claim(claim);
  return job;
}

absl::StatusOr<JobRecord> Start(JobRecord job, const std::string& claim, base::UnixMicros now) {
  RETURN_IF_ERROR(CheckClaim(job, claim));
  if (job.state() == v1::JOB_STATE_RUNNING) return job;
  job.set_state(v1::JOB_STATE_RUNNING);
  job.set_start_time(now);
  job.set_starts(job.starts() + 1);
  return job;
}

absl::StatusOr<JobRecord> Release(JobRecord job, const std::string& claim) {
  // A repetition finds it released, or claimed again by another.
  if (job.claim() != claim) return job;
  RETURN_IF_ERROR(CheckClaim(job, claim));
  if (job.state() == v1::JOB_STATE_RUNNING) job.set_starts(job.starts() - 1);
  job.set_state(v1::JOB_STATE_QUEUED);
  job.clear_owner();
  job.clear_claim();
  return job;
}

absl::StatusOr<JobRecord> Finish(JobRecord job, const std::string& claim,
                                 const JobOutcome& outcome) {
  if (IsFinal(job.state()) && !claim.empty() && job.claim() == claim) return job;
  RETURN_IF_ERROR(CheckClaim(job, claim));
  return Ended(std::move(job), outcome);
}

JobRecord Cancel(JobRecord job, const absl::Status& reason, base::UnixMicros now) {
  if (IsFinal(job.state())) return job;
  if (job.owner().empty()) {
    return Ended(std::move(job), {.status = reason, .result = std::nullopt, .end_time = now});
  }
  // The first reason stays.
  if (job.cancel_code() == 0) job.set_cancel_code(static_cast<int32_t>(reason.code()));
  return job;
}

JobRecord Fence(JobRecord job, base::UnixMicros now) {
  if (IsFinal(job.state())) return job;
  if (job.cancel_code() != 0) {
    // Whoever asked has been told that it will end.
    const auto code = static_cast<absl::StatusCode>(job.cancel_code());
    return Ended(std::move(job),
                 {.status = absl::Status(code, "it was cancelled while the server went down"),
                  .result = std::nullopt,
                  .end_time = now});
  }
  if (job.starts() >= kMaxStarts) {
    // Made before the job is moved from: arguments have no order.
    const absl::Status given_up = absl::InternalError(absl::StrCat(
        "the server went down ", job.starts(), " times while this job ran; it is not tried again"));
    return Ended(std::move(job), {.status = given_up, .result = std::nullopt, .end_time = now});
  }
  job.set_state(v1::JOB_STATE_QUEUED);
  job.clear_owner();
  job.clear_claim();
  return job;
}

absl::Status CheckRemovable(const JobRecord& job) {
  if (IsFinal(job.state())) return absl::OkStatus();
  return base::PreconditionError("NOT_ENDED", job.id(), "the job has not ended; cancel it first");
}

absl::StatusOr<CalibrationRecord> Commit(CalibrationRecord calibration, const SumsCommit& commit) {
  if (calibration.finalize_time() != 0) {
    if (commit.finalize && calibration.sums().name() == commit.sums.name()) return calibration;
    return FinalizedError();
  }
  *calibration.mutable_sums() = commit.sums;
  calibration.set_tokens(commit.tokens);
  calibration.set_held_out_tokens(commit.held_out_tokens);
  calibration.mutable_streams()->Assign(commit.streams.begin(), commit.streams.end());
  calibration.set_update_time(commit.update_time);
  if (commit.finalize) {
    calibration.set_finalize_time(commit.update_time);
    calibration.set_sums_sha256(commit.sums_sha256);
  }
  return calibration;
}

absl::Status CheckFinalized(const CalibrationRecord& calibration) {
  if (calibration.finalize_time() != 0) return absl::OkStatus();
  return base::PreconditionError("NOT_FINALIZED", calibration.id(),
                                 "the calibration is not finalized");
}

absl::Status CheckRemovable(const CalibrationRecord& calibration, int64_t jobs) {
  if (jobs == 0) return absl::OkStatus();
  return base::PreconditionError(
      "IN_USE", calibration.id(),
      absl::StrCat(jobs, " jobs that have not ended use the calibration"));
}

absl::Status FinalizedError() {
  return base::PreconditionError("FINALIZED", "calibration_id",
                                 "the calibration is finalized and takes no more tokens");
}

}  // namespace certiq::server
