// Admission: what is asked of a job at its header, once, however it was sent.

#ifndef CERTIQ_JOB_ADMISSION_H_
#define CERTIQ_JOB_ADMISSION_H_

#include <cstdint>

#include "absl/status/statusor.h"
#include "calibration/calibration_desk.h"
#include "calibration/environment.h"
#include "job/job_request.h"
#include "runtime/byte_budget.h"
#include "runtime/tenant.h"
#include "runtime/tenant_quota.h"
#include "runtime/worker_pool.h"
#include "store/records.h"

namespace certiq::server {

// What an admitted job holds from its header on.
struct Admission {
  // One of the tenant's jobs, and a place in the queue.
  CountQuota::Permit permit;
  WorkerPool::Slot slot;
  // Set where the job names a calibration.
  CalibrationDesk::Pin calibration;
  // The peak of a job that is not stored, upload and run; of one that is, the messages in memory
  // while it is uploaded.
  ByteBudget::Reservation memory;
  // What a stored job's weights and result take in the store.
  ByteBudget::Reservation storage;
};

// Checks the request and takes what it needs. Errors, in the order of the checks: UNAVAILABLE with
// a retry delay while the server drains; INVALID_ARGUMENT about sizes and the spec; NOT_FOUND,
// FAILED_PRECONDITION about the calibration or the tokens; RESOURCE_EXHAUSTED where a quota, the
// queue or a budget has no room, with a retry delay unless it never could.
absl::StatusOr<Admission> Admit(const Environment& environment, CalibrationDesk& calibrations,
                                const Tenant& tenant, const JobRequest& request);

// Bytes that weights and result of a stored job take in the store, at most.
int64_t StoredBytes(int64_t rows, int64_t features, engine::DType weight_dtype,
                    const engine::ResolvedSpec& spec);

// Bytes that a job takes in the store once it has ended: its result and its record.
inline int64_t EndedBytes(const JobRecord& job) {
  return BlobBytes(job.result().blob().bytes()) + RecordBytes(job);
}

// Bytes that a stored job needs to run.
int64_t RunBytes(int64_t rows, int64_t features, const engine::ResolvedSpec& spec,
                 const CalibrationRecord& calibration);

// Bytes that the engine needs for a job that is not stored, once everything has come.
int64_t EngineBytes(const JobRequest& request, const CalibrationDesk::Pin& calibration);

// Stored weights are read in runs of whole rows of about so many bytes.
inline constexpr int64_t kWeightReadBytes = int64_t{4} << 20;

}  // namespace certiq::server

#endif  // CERTIQ_JOB_ADMISSION_H_
