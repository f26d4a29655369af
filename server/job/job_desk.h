// The desk for jobs: what calls ask of them.

#ifndef CERTIQ_JOB_JOB_DESK_H_
#define CERTIQ_JOB_JOB_DESK_H_

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "base/listener.h"
#include "calibration/calibration_desk.h"
#include "calibration/environment.h"
#include "contract/paging.h"
#include "engine/run_context.h"
#include "job/job_events.h"
#include "job/job_holdings.h"
#include "job/job_request.h"
#include "job/result.h"
#include "job/runner.h"
#include "job/upload.h"
#include "runtime/tenant.h"

namespace certiq::server {

// A stored job as calls see it.
struct JobView {
  JobRecord record;
  // While it runs here.
  JobProgress progress;
  // Stored jobs that start before it; -1 unless it is queued.
  int64_t queue_position = -1;
};

// The truth about jobs is in the catalog; the desk itself keeps none. A tenant sees its own jobs;
// everything else is NOT_FOUND. Calls touch the disk. Thread-safe.
class JobDesk {
 public:
  // `replica` names this process in the catalog.
  JobDesk(const Environment& environment, CalibrationDesk& calibrations, std::string replica)
      : env_(environment),
        calibrations_(calibrations),
        events_(environment.observer),
        runner_(environment, calibrations, events_, holdings_, std::move(replica)) {}

  // Takes what a job holds that was there when the process started.
  void Found(const JobRecord& job);
  // Starts to run jobs, once all were found.
  void Start() { runner_.Poke(); }

  // Admits a job, stored or not, at its header. ALREADY_EXISTS where the request_id of a stored one
  // was used with other content; errors are Admit's otherwise. `cancellation` outlives the upload.
  absl::StatusOr<std::unique_ptr<Upload>> Begin(const Tenant& tenant, JobRequest request,
                                                const engine::Cancellation& cancellation);
  // Queues the job of a stored upload, or finds the one that the same request made before.
  absl::StatusOr<JobView> Add(const Tenant& tenant, Upload& upload);

  absl::StatusOr<JobView> Get(const Tenant& tenant, const std::string& id) const;
  // Newest first; `next_page_token` is empty on the last page.
  absl::StatusOr<std::vector<JobView>> List(const Tenant& tenant, std::vector<JobState> states,
                                            const std::string& calibration_id,
                                            const PageRequest& page,
                                            std::string& next_page_token) const;
  // Ends a job for CANCELLED or DEADLINE_EXCEEDED: at once while it waits, within a block of work
  // while it runs. The job as it is then.
  absl::StatusOr<JobView> Cancel(const Tenant& tenant, const std::string& id,
                                 absl::StatusCode reason);
  // FAILED_PRECONDITION while it has not ended.
  absl::Status Remove(const Tenant& tenant, const std::string& id);
  // The result from a byte of its tensors on. FAILED_PRECONDITION unless the job succeeded,
  // INVALID_ARGUMENT for an offset beyond the tensors.
  absl::StatusOr<std::unique_ptr<ResultReader>> OpenResult(const Tenant& tenant,
                                                           const std::string& id,
                                                           int64_t byte_offset) const;
  JobEvents& events() { return events_; }

  // Ends what is past its deadline, deletes what has expired, writes what could not be written.
  void Tick();
  // Starts no more jobs; those that wait stay in the catalog.
  void StopStarting() { runner_.StopClaiming(); }

 private:
  JobView ViewOf(JobRecord job) const;
  // What a request is answered whose request_id made `job`.
  absl::Status CheckSame(const JobRecord& job, const JobRequest& request,
                         const std::string* weights_sha256) const;

  const Environment env_;
  CalibrationDesk& calibrations_;
  JobHoldings holdings_;
  JobEvents events_;
  Runner runner_;
};

}  // namespace certiq::server

#endif  // CERTIQ_JOB_JOB_DESK_H_
