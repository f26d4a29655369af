// All stored jobs of this server.

#ifndef CERTIQ_JOB_JOB_MANAGER_H_
#define CERTIQ_JOB_JOB_MANAGER_H_

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstddef>
#include <cstdint>
#include <map>
#include <memory>
#include <mutex>
#include <set>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "base/sha256.h"
#include "calibration/calibration_registry.h"
#include "engine/kernels/dtype.h"
#include "engine/spec.h"
#include "job/codec.h"
#include "job/paging.h"
#include "job/stored_job.h"
#include "runtime/tenant.h"

namespace certiq::server {

// A job as its header asks for it.
struct JobRequest {
  std::string request_id;
  // Of the header's content; the weights have their own.
  std::string digest;
  std::string layer_name;
  std::string calibration_id;
  // The spec as it is kept, and as it was understood.
  std::string stored_spec;
  engine::ResolvedSpec spec;
  int64_t rows = 0;
  int64_t features = 0;
  engine::DType weight_dtype = engine::DType::kF32;
  int32_t priority = 0;
  // 0: none.
  int64_t deadline_micros = 0;
  int64_t ttl_micros = kDefaultTtlMicros;
};

// Starts of one job, crashes in between included.
inline constexpr int32_t kMaxStarts = 4;

class JobManager;

// The weights of a job on their way into the store. What is not finished leaves no trace. Not
// thread-safe; touches the disk.
class JobUpload {
 public:
  ~JobUpload();
  // Takes whole rows from `row_offset` on: the rows sent before. INVALID_ARGUMENT for rows that do
  // not fit and values that are not finite.
  absl::Status Append(int64_t row_offset, std::span<const std::byte> bytes);
  // Queues the job, or finds the one that the same request made before.
  absl::StatusOr<std::shared_ptr<StoredJob>> Finish();

 private:
  friend class JobManager;
  JobUpload(JobManager& manager, Tenant tenant, JobRequest request)
      : manager_(manager), tenant_(std::move(tenant)), request_(std::move(request)) {}

  JobManager& manager_;
  const Tenant tenant_;
  const JobRequest request_;
  // The request was answered before: nothing is stored, the weights are compared.
  std::shared_ptr<StoredJob> existing_;
  bool creating_ = false;
  StoredJob::Holdings holdings_;
  WorkerPool::Slot slot_;
  StoredJob::Keeps keeps_;
  std::unique_ptr<BlobWriter> writer_;
  base::Sha256 digest_;
  int64_t rows_ = 0;
  std::vector<float> row_;
};

// Thread-safe. A tenant sees its own jobs; everything else is NOT_FOUND.
class JobManager {
 public:
  JobManager(const Environment& environment, Calibrations& calibrations, const Codec& codec)
      : env_(environment), calibrations_(calibrations), codec_(codec) {}

  // What was there when the server went down: what had not ended is queued again, up to kMaxStarts
  // starts in all. REQUIRES: nobody uses the manager yet.
  void Restore(std::vector<JobRecord> records);

  // Checks the request and takes what it needs: a place in the queue, its calibration, room for
  // weights and result. The manager outlives the upload. Errors as CreateJob lists them.
  absl::StatusOr<std::unique_ptr<JobUpload>> Begin(const Tenant& tenant, JobRequest request);

  absl::StatusOr<std::shared_ptr<StoredJob>> Find(const Tenant& tenant,
                                                  const std::string& id) const;
  // Newest first. Empty `states`: all; empty `calibration_id`: any.
  absl::StatusOr<Page<JobView>> List(const Tenant& tenant, const std::set<JobState>& states,
                                     const std::string& calibration_id, int32_t page_size,
                                     const std::string& page_token) const;
  // FAILED_PRECONDITION while it has not ended. Touches the disk.
  absl::Status Remove(const Tenant& tenant, const std::string& id);

  // Ends what is past its deadline, deletes what has expired, writes what could not be written.
  void Tick();

  // Starts no more jobs, and takes no new ones; those that wait stay in the store.
  void StopStarting() { hold_ = true; }
  // Jobs that run.
  int64_t running() const;

 private:
  friend class JobUpload;
  using RequestKey = std::pair<std::string, std::string>;  // tenant, request_id

  absl::Status Prepare(JobUpload& upload);
  absl::StatusOr<std::shared_ptr<StoredJob>> Commit(JobUpload& upload);
  void RestoreOne(JobRecord record);
  void Insert(const std::shared_ptr<StoredJob>& job, const JobRecord& record);
  std::vector<std::shared_ptr<StoredJob>> All() const;

  const Environment env_;
  Calibrations& calibrations_;
  const Codec& codec_;
  // No job is ready to start.
  std::atomic<bool> hold_{false};

  mutable std::mutex mu_;
  // All guarded by mu_.
  std::map<std::string, std::shared_ptr<StoredJob>> by_id_;
  std::map<RequestKey, std::string> by_request_;
  std::set<RequestKey> creating_;
  int64_t next_number_ = 1;
};

}  // namespace certiq::server

#endif  // CERTIQ_JOB_JOB_MANAGER_H_
