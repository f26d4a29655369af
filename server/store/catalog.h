// The catalog: the records of calibrations and jobs, the one truth about them.

#ifndef CERTIQ_STORE_CATALOG_H_
#define CERTIQ_STORE_CATALOG_H_

#include <cstdint>
#include <optional>
#include <set>
#include <string>
#include <utility>
#include <vector>

#include "absl/functional/function_ref.h"
#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "base/clock.h"
#include "store/records.h"
#include "store/transitions.h"

namespace certiq::server {

// Where a page of a list goes on: behind the record of this creation time and id. Lists are newest
// first, so that what comes and goes between two pages shifts nothing.
using PageKey = std::pair<base::UnixMicros, std::string>;

struct CalibrationFilter {
  std::string tenant;
  // Empty: any.
  std::string label;
};

struct JobFilter {
  std::string tenant;
  // Empty: all.
  std::vector<JobState> states;
  // Empty: any.
  std::string calibration_id;
};

// A job before and after an event. `changed` is false where the state stayed: a repeated call found
// it done, or a job that somebody has claimed was marked.
struct JobChange {
  JobState before = v1::JOB_STATE_UNSPECIFIED;
  JobRecord job;
  bool changed = true;
  // The weights that the record named before and does not name any more.
  BlobRef weights = {};
};

// Each method is one transaction: durable when it returns OK, undone where it does not. Ids and
// claims are made by the caller before the first try, so that repeating a call whose answer was
// lost is safe. What may happen to a record is decided by transitions.h.
//
// Errors of every method unless said otherwise: RESOURCE_EXHAUSTED with a retry delay where the
// disk is full, UNAVAILABLE with one where it fails otherwise, DATA_LOSS naming the file where it
// holds something else than was written; NOT_FOUND where there is no such record or it belongs to
// another tenant; ABORTED where the caller's claim is not the record's any more. The catalog stays
// usable after an error. Thread-safe. Calls touch the disk: they do not belong on gRPC's threads.
class Catalog {
 public:
  virtual ~Catalog() = default;

  // False: everything goes with the process.
  virtual bool durable() const = 0;

  // False while a write that failed could still come back after a crash: blobs that a record named
  // before it must stay until the next start.
  virtual bool settled() const = 0;

  // Makes `replica` the only one that claims: whoever claimed before is fenced, as it was when its
  // process died. `calibration` and `job` (by number) are told of every record as it is then.
  // Once, before anything else.
  virtual absl::Status Register(const std::string& replica, base::UnixMicros now,
                                absl::FunctionRef<void(const CalibrationRecord&)> calibration,
                                absl::FunctionRef<void(const JobRecord&)> job) = 0;

  // The new calibration, or the one that the same request_id of this tenant made before.
  virtual absl::StatusOr<CalibrationRecord> AddCalibration(const CalibrationRecord& record) = 0;
  virtual absl::StatusOr<CalibrationRecord> FindCalibration(const std::string& tenant,
                                                            const std::string& id) = 0;
  // Nothing where the request made none. REQUIRES: !request_id.empty().
  virtual absl::StatusOr<std::optional<CalibrationRecord>> FindCalibrationOfRequest(
      const std::string& tenant, const std::string& request_id) = 0;
  // At most `count`, newest first, behind `after` where it is given; not more after the record with
  // which they have more than kMaxPageBytes. So are Jobs.
  virtual absl::StatusOr<std::vector<CalibrationRecord>> Calibrations(
      const CalibrationFilter& filter, const std::optional<PageKey>& after, int64_t count) = 0;
  // Those whose time to live is over.
  virtual absl::StatusOr<std::vector<CalibrationRecord>> ExpiredCalibrations(
      base::UnixMicros now) = 0;
  // The sums and the positions that they hold, together.
  virtual absl::StatusOr<CalibrationRecord> CommitSums(const std::string& id,
                                                       const SumsCommit& commit) = 0;
  // FAILED_PRECONDITION while a job that has not ended uses it. Returns what was removed.
  virtual absl::StatusOr<CalibrationRecord> RemoveCalibration(const std::string& tenant,
                                                              const std::string& id) = 0;
  // Jobs that have not ended and use the calibration.
  virtual absl::StatusOr<int64_t> UnfinishedJobs(const std::string& calibration_id) = 0;

  // The new job, numbered, or the one that the same request_id of this tenant made before.
  // FAILED_PRECONDITION or NOT_FOUND where its calibration is not finalized or gone.
  virtual absl::StatusOr<JobChange> AddJob(const JobRecord& record) = 0;
  virtual absl::StatusOr<JobRecord> FindJob(const std::string& tenant, const std::string& id) = 0;
  // Nothing where the request made none. REQUIRES: !request_id.empty().
  virtual absl::StatusOr<std::optional<JobRecord>> FindJobOfRequest(
      const std::string& tenant, const std::string& request_id) = 0;
  virtual absl::StatusOr<std::vector<JobRecord>> Jobs(const JobFilter& filter,
                                                      const std::optional<PageKey>& after,
                                                      int64_t count) = 0;
  // Queued jobs that are started before this one; -1 where it is not queued.
  virtual absl::StatusOr<int64_t> Ahead(const JobRecord& job) = 0;
  // Those that have not ended and are past their deadline.
  virtual absl::StatusOr<std::vector<JobRecord>> OverdueJobs(base::UnixMicros now) = 0;
  virtual absl::StatusOr<std::vector<JobRecord>> ExpiredJobs(base::UnixMicros now) = 0;

  // The queued job of the highest priority that nobody has claimed, the oldest first; nothing where
  // there is none. Jobs of the tenants in `without` are passed over. Repeated with the same claim:
  // the job that it claimed, while it has not ended.
  virtual absl::StatusOr<std::optional<JobRecord>> ClaimJob(
      const std::string& replica, const std::string& claim,
      const std::set<std::string>& without) = 0;
  virtual absl::StatusOr<JobChange> StartJob(const std::string& id, const std::string& claim,
                                             base::UnixMicros now) = 0;
  // Gives a claimed job back to the queue; a start is not counted.
  virtual absl::StatusOr<JobChange> ReleaseJob(const std::string& id, const std::string& claim) = 0;
  virtual absl::StatusOr<JobChange> FinishJob(const std::string& id, const std::string& claim,
                                              const JobOutcome& outcome) = 0;
  // Ends a job that nobody has claimed; marks one that is claimed, whose owner ends it.
  virtual absl::StatusOr<JobChange> CancelJob(const std::string& tenant, const std::string& id,
                                              const absl::Status& reason, base::UnixMicros now) = 0;
  // FAILED_PRECONDITION where it has not ended. Returns what was removed.
  virtual absl::StatusOr<JobRecord> RemoveJob(const std::string& tenant, const std::string& id) = 0;
};

}  // namespace certiq::server

#endif  // CERTIQ_STORE_CATALOG_H_
