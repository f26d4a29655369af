// The state machine of records: what may happen to a job or a calibration.

#ifndef CERTIQ_STORE_TRANSITIONS_H_
#define CERTIQ_STORE_TRANSITIONS_H_

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "base/clock.h"
#include "store/records.h"

namespace certiq::server {

// Pure functions that a catalog calls between reading a record and writing it: each returns the
// record after the event, or why the event may not happen. So all catalogs agree, and a test asks
// every event in every state.

// Starts of one job, crashes in between included.
inline constexpr int32_t kMaxStarts = 4;

// How a run ended.
struct JobOutcome {
  // OK, or why there is no result. CANCELLED and DEADLINE_EXCEEDED have states of their own.
  absl::Status status;
  // Set where the job succeeded.
  std::optional<ResultRecord> result;
  base::UnixMicros end_time = 0;
};

// The final state that a status stands for.
JobState StateOf(absl::StatusCode code);

// QUEUED and nobody's -> QUEUED and `replica`'s. ABORTED otherwise; repeating the same claim is
// fine.
absl::StatusOr<JobRecord> Claim(JobRecord job, const std::string& replica,
                                const std::string& claim);
// QUEUED -> RUNNING, counted. ABORTED unless the claim is the job's.
absl::StatusOr<JobRecord> Start(JobRecord job, const std::string& claim, base::UnixMicros now);
// QUEUED or RUNNING -> QUEUED and nobody's; a start is given back.
absl::StatusOr<JobRecord> Release(JobRecord job, const std::string& claim);
// QUEUED or RUNNING -> a final state; its claim stays named, so that a repetition is recognised.
absl::StatusOr<JobRecord> Finish(JobRecord job, const std::string& claim,
                                 const JobOutcome& outcome);
// Nobody's -> a final state; claimed -> marked for its owner; ended -> as it was.
JobRecord Cancel(JobRecord job, const absl::Status& reason, base::UnixMicros now);
// The owner is dead: QUEUED again, or FAILED after kMaxStarts starts. What is final stays.
JobRecord Fence(JobRecord job, base::UnixMicros now);
// FAILED_PRECONDITION where the job has not ended.
absl::Status CheckRemovable(const JobRecord& job);

// Sums that are in the blob store, and the positions that they hold.
struct SumsCommit {
  BlobRef sums;
  int64_t tokens = 0;
  int64_t held_out_tokens = 0;
  std::vector<StreamRecord> streams;
  base::UnixMicros update_time = 0;
  // Set where the sums never change again.
  bool finalize = false;
  std::string sums_sha256;
};

// OPEN -> OPEN or FINALIZED. FAILED_PRECONDITION where it is finalized, unless by this very commit.
absl::StatusOr<CalibrationRecord> Commit(CalibrationRecord calibration, const SumsCommit& commit);
// FAILED_PRECONDITION where the calibration is not finalized.
absl::Status CheckFinalized(const CalibrationRecord& calibration);
// FAILED_PRECONDITION where `jobs` that have not ended use the calibration.
absl::Status CheckRemovable(const CalibrationRecord& calibration, int64_t jobs);
// What a call is told that would add to a finalized calibration.
absl::Status FinalizedError();

}  // namespace certiq::server

#endif  // CERTIQ_STORE_TRANSITIONS_H_
