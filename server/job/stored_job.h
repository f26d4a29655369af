// One job that outlives the call that asked for it.

#ifndef CERTIQ_JOB_STORED_JOB_H_
#define CERTIQ_JOB_STORED_JOB_H_

#include <atomic>
#include <cstdint>
#include <memory>
#include <mutex>
#include <optional>
#include <set>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "base/clock.h"
#include "base/listener.h"
#include "calibration/calibration.h"
#include "engine/certificate.h"
#include "engine/kernels/strip_matrix.h"
#include "engine/quantize_layer.h"
#include "engine/run_context.h"
#include "engine/spec.h"
#include "job/codec.h"
#include "runtime/byte_budget.h"
#include "runtime/tenant_quota.h"
#include "runtime/worker_pool.h"
#include "store/store.h"

namespace certiq::server {

// Stored weights are read in runs of whole rows of about so many bytes.
inline constexpr int64_t kWeightReadBytes = int64_t{4} << 20;

struct JobView {
  JobRecord record;
  // While it runs.
  engine::Phase phase = engine::Phase::kQueue;
  double fraction = 0;
  // Jobs that start before it; -1 unless it is queued.
  int64_t queue_position = -1;
};

// QUEUED -> RUNNING -> a final state, each written to the store before anybody sees it. Owned by
// std::shared_ptr. Thread-safe.
class StoredJob : public std::enable_shared_from_this<StoredJob> {
 public:
  // What it holds until it ends: its place among the tenant's jobs, its calibration.
  struct Holdings {
    CountQuota::Place place;
    Calibration::Pin calibration;
  };

  // What it keeps as long as it is known: `stored` pays for its weights and its result in the
  // store, `record` for what is said of it in memory.
  struct Keeps {
    ByteBudget::Reservation stored;
    ByteBudget::Reservation record;
  };

  // `record` is in the store.
  StoredJob(const Environment& environment, const Codec& codec, JobRecord record,
            engine::ResolvedSpec spec, Holdings holdings, Keeps keeps);
  // One that ended before this server started.
  StoredJob(const Environment& environment, const Codec& codec, JobRecord record, Keeps keeps);

  // Bytes its weights and result take in the store, at most.
  static int64_t StoredBytes(const JobRecord& record, const engine::ResolvedSpec& spec);
  // Bytes of its record in memory; an explicit grid in the spec may be large.
  static int64_t RecordBytes(const JobRecord& record);
  // Bytes it needs to run.
  static int64_t PeakBytes(const JobRecord& record, const engine::ResolvedSpec& spec,
                           const CalibrationRecord& calibration);

  // Queues it. Not started again while `hold` (of the manager) is set.
  void Start(WorkerPool::Slot slot, const std::atomic<bool>& hold);

  JobView View() const;
  const std::string& id() const { return id_; }
  const std::string& tenant() const { return tenant_; }
  bool ended() const;

  // Ends it for a reason, CANCELLED or DEADLINE_EXCEEDED: at once while it waits, within a block of
  // work while it runs. Touches the disk.
  void Cancel(absl::StatusCode reason);

  // Ends it before it was ever queued here. Touches the disk.
  void Fail(const absl::Status& status) { End(status); }

  void Watch(const std::shared_ptr<base::Listener>& listener);
  void Unwatch(const std::shared_ptr<base::Listener>& listener);

  // Writes an end that could not be written; queues again what could not be started.
  void Retry();
  // Whether it has ended and its time is over.
  bool Expired(base::UnixMicros now) const;
  bool PastDeadline(base::UnixMicros now) const;

  // From the store too. REQUIRES: it has ended, and nobody else does this.
  absl::Status Remove();

 private:
  bool Ready();
  absl::Status Run();
  absl::StatusOr<engine::QuantizedLayer> Quantize(const JobRecord& record, CallFacts& facts);
  absl::StatusOr<engine::StripMatrix> ReadWeights(const JobRecord& record) const;
  // Names the result in `record`.
  absl::Status WriteResult(const engine::QuantizedLayer& layer, const CallFacts& facts,
                           JobRecord& record) const;
  // The pool is done with it.
  void Done(const absl::Status& status);
  // The server stops: it will start again with the next one.
  void LeaveQueued();
  void End(const absl::Status& status);
  // Publishes unwritten_ and lets go of what only a job that has not ended holds.
  void WriteEnd();
  // Writes `next` and makes it what everybody sees.
  absl::Status Publish(JobRecord next);
  void Show(JobRecord next);
  void Enqueue(WorkerPool::Slot slot);
  void NotifyAll();

  const Environment env_;
  const Codec& codec_;
  const std::string id_;
  const std::string tenant_;
  const engine::ResolvedSpec spec_;
  const std::shared_ptr<engine::Cancellation> cancellation_ =
      std::make_shared<engine::Cancellation>();
  const std::atomic<bool>* hold_ = nullptr;

  // Of the run; touched by whoever has it: a worker, or who ends it while it waits.
  ByteBudget::Reservation memory_;
  std::optional<engine::LayerCertificate> certificate_;
  // The record with its result, where there is one.
  std::optional<JobRecord> finished_;
  // That it started could not be written.
  bool start_failed_ = false;

  mutable std::mutex mu_;
  // All guarded by mu_.
  JobRecord record_;
  engine::Phase phase_ = engine::Phase::kQueue;
  double fraction_ = 0;
  std::optional<WorkerPool::JobId> pool_id_;
  std::set<std::shared_ptr<base::Listener>> listeners_;
  Holdings holdings_;
  Keeps keeps_;
  // Final, but not in the store yet; and what the observer will hear.
  std::optional<JobRecord> unwritten_;
  absl::Status outcome_;
  // It could not be started, for want of the disk.
  bool start_again_ = false;
};

}  // namespace certiq::server

#endif  // CERTIQ_JOB_STORED_JOB_H_
