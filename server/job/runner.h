// The runner: claims stored jobs, runs them, and writes how they ended.

#ifndef CERTIQ_JOB_RUNNER_H_
#define CERTIQ_JOB_RUNNER_H_

#include <chrono>
#include <cstdint>
#include <map>
#include <memory>
#include <optional>
#include <string>

#include "absl/base/thread_annotations.h"
#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "base/mutex.h"
#include "calibration/calibration_desk.h"
#include "calibration/environment.h"
#include "engine/certificate.h"
#include "engine/run_context.h"
#include "engine/spec.h"
#include "job/job_events.h"
#include "job/job_holdings.h"
#include "job/run.h"
#include "runtime/byte_budget.h"
#include "runtime/strand.h"

namespace certiq::server {

// The progress of a job that runs here.
struct JobProgress {
  engine::Phase phase = engine::Phase::kQueue;
  double fraction = 0;
};

// At most one claimed job waits here for a worker and for memory: so a large one holds up this
// process and no other, and a job of a higher priority that comes meanwhile goes first. One that
// waits for its own tenant's memory is given back, and holds up that tenant alone. A run that
// the process itself cuts short is given back, uncounted; an end that cannot be written is written
// later. Where the disk has no room for a result, the job waits in the queue until there is some,
// its weights kept; it ends as RESOURCE_EXHAUSTED only after several runs for nothing, or minutes.
// Thread-safe.
class Runner {
 public:
  Runner(const Environment& environment, CalibrationDesk& calibrations, JobEvents& events,
         JobHoldings& holdings, std::string replica);

  // Claims what can be claimed, soon. After a job was added, `priority` is its: one that waits with
  // a lower one is given back.
  void Poke(std::optional<int32_t> priority = std::nullopt);
  // Ends a job for a reason, CANCELLED or DEADLINE_EXCEEDED: at once where it waits, within a block
  // of work where it runs here. The job as it was when its end was asked for.
  absl::StatusOr<JobRecord> Cancel(const std::string& tenant, const std::string& id,
                                   absl::StatusCode reason);
  // Nothing where the job does not run here.
  std::optional<JobProgress> ProgressOf(const std::string& id) const;
  // Writes ends that could not be written, and claims again after a failure.
  void Tick();
  // Claims nothing from now on.
  void StopClaiming();

 private:
  // A claimed job.
  struct Claimed {
    JobRecord job;
    engine::ResolvedSpec spec;
    CalibrationRecord calibration;
    // Whose it is and what it needs to run; set before it is seen by others.
    std::string tenant;
    int64_t run_bytes = 0;
    // Null where it ends before it runs.
    std::shared_ptr<Run> run;
    ByteBudget::Reservation memory;
    bool waiting = true;
    // One of a higher priority came while it waited.
    bool outranked = false;
    JobProgress progress;
    // The run's own: its steps touch them, one at a time.
    std::optional<ResultRecord> result;
    std::optional<engine::LayerCertificate> certificate;
    bool start_failed = false;
    // What its result takes, where the disk had no room for it; else 0.
    int64_t missing_bytes = 0;
    // The end that is to be written, once there is one, and whether it was told to the metrics.
    std::optional<JobOutcome> outcome;
    bool reported = false;
    // What ended it could not be written: the next tick tries again.
    bool retry = false;
  };
  using ClaimedPtr = std::shared_ptr<Claimed>;

  // Of a job whose result found no room.
  struct NoRoom {
    int runs = 0;
    std::chrono::steady_clock::time_point since;
  };
  // What there is to be room for before a job is claimed, and how long that is waited for.
  struct RoomWanted {
    int64_t bytes = 0;
    std::chrono::steady_clock::time_point until;
  };

  // In the strand.
  absl::Status ClaimNext();
  void Begin(const JobRecord& job);
  // What a claimed job needs to run; an error ends it.
  absl::Status Prepare(Claimed& claimed);
  // Whether its tenant's own memory has no room for it now: then others go first, and no job of the
  // tenant is claimed until there is.
  bool ShortOfItsOwn(const Claimed& claimed);
  // Looks again at whose memory jobs wait for.
  void LookAtTenants();
  std::shared_ptr<Run> MakeRun(const ClaimedPtr& claimed);
  // The steps of a run.
  bool Reserve(const ClaimedPtr& claimed);
  absl::StatusOr<RunInput> Load(const ClaimedPtr& claimed);
  absl::Status Keep(const ClaimedPtr& claimed, engine::QuantizedLayer layer,
                    const CertificateFacts& facts);
  void Done(const ClaimedPtr& claimed, const absl::Status& status);

  // Whether a job whose result found no room is to run again; what is claimed waits for room then.
  bool WaitsForRoom(const Claimed& claimed);
  // Ends the wait for room where there is some, or it took too long.
  void LookForRoom();
  absl::StatusOr<engine::StripMatrix> ReadWeights(const JobRecord& job) const;
  // Gives a claimed job back to the queue.
  void Release(const ClaimedPtr& claimed);
  void End(const ClaimedPtr& claimed, const absl::Status& status);
  void WriteEnd(const ClaimedPtr& claimed);
  void Forget(const ClaimedPtr& claimed);

  const Environment env_;
  CalibrationDesk& calibrations_;
  JobEvents& events_;
  JobHoldings& holdings_;
  const std::string replica_;
  const std::shared_ptr<Strand> strand_;
  // In the strand: the claim that is tried until it is answered; empty where the last one was.
  std::string claim_;

  mutable base::Mutex mu_;
  std::map<std::string, ClaimedPtr> claimed_ ABSL_GUARDED_BY(mu_);
  bool stopped_ ABSL_GUARDED_BY(mu_) = false;
  // A claim or a start failed: the next tick tries again.
  bool resting_ ABSL_GUARDED_BY(mu_) = false;
  std::map<std::string, NoRoom> no_room_ ABSL_GUARDED_BY(mu_);
  std::optional<RoomWanted> room_wanted_ ABSL_GUARDED_BY(mu_);
  bool posted_ ABSL_GUARDED_BY(mu_) = false;
  // Tenants whose next job waits for memory of their own, and how much it needs.
  std::map<std::string, int64_t> short_ ABSL_GUARDED_BY(mu_);
  // The highest priority of the jobs that were added since the last claim began.
  std::optional<int32_t> added_ ABSL_GUARDED_BY(mu_);
};

}  // namespace certiq::server

#endif  // CERTIQ_JOB_RUNNER_H_
