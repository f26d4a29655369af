// What outlives the process: records of calibrations and jobs, and the bytes
// of their tensors.

#ifndef CERTIQ_STORE_STORE_H_
#define CERTIQ_STORE_STORE_H_

#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "base/clock.h"
#include "job/job_state.h"

namespace certiq::server {

// Names immutable bytes in the store. Empty: none.
struct BlobRef {
  std::string name;
  int64_t bytes = 0;

  bool empty() const { return name.empty(); }
  bool operator==(const BlobRef&) const = default;
};

// Position of one stream of a calibration.
struct StreamRecord {
  std::string id;
  // The next chunk expected; 1 for imported sums.
  int64_t sequence = 0;
  // Tokens in those chunks.
  int64_t tokens = 0;
  bool imported = false;

  bool operator==(const StreamRecord&) const = default;
};

struct CalibrationRecord {
  std::string id;
  std::string tenant;
  // With the digest of the request's content: makes creation idempotent. Empty: it is not.
  std::string request_id;
  std::string request_digest;
  int64_t features = 0;
  bool mismatched = false;
  double held_out_fraction = 0;
  int64_t held_out_block_rows = 0;
  std::vector<std::string> labels;
  base::UnixMicros create_time = 0;
  // Last change; it expires ttl after it.
  base::UnixMicros update_time = 0;
  int64_t ttl_micros = 0;
  // 0 while open.
  base::UnixMicros finalize_time = 0;
  int64_t tokens = 0;
  int64_t held_out_tokens = 0;
  // The sums that hold exactly the chunks that `streams` counts.
  BlobRef sums;
  std::string sums_sha256;
  std::vector<StreamRecord> streams;

  bool operator==(const CalibrationRecord&) const = default;
};

struct JobRecord {
  std::string id;
  std::string tenant;
  std::string request_id;
  std::string request_digest;
  // Order of creation, larger is later; unique.
  int64_t number = 0;
  std::string layer_name;
  std::string calibration_id;
  // Opaque here: made and read by rpc/.
  std::string spec;
  int64_t rows = 0;
  int64_t features = 0;
  // engine::DType of the stored weights, and the SHA-256 (hex) of their bytes.
  int32_t weight_dtype = 0;
  std::string weights_sha256;
  // Gone once the job has ended.
  BlobRef weights;
  int32_t priority = 0;
  base::UnixMicros create_time = 0;
  base::UnixMicros start_time = 0;
  base::UnixMicros end_time = 0;
  base::UnixMicros deadline_time = 0;
  int64_t ttl_micros = 0;
  JobState state = JobState::kQueued;
  // Counted before each start, so that a crash during one is counted too.
  int32_t starts = 0;
  // Opaque: why it did not succeed.
  std::string error;
  // The bytes of all tensors, then the certificate's parts, each after its length (uint32,
  // little-endian).
  BlobRef result;
  int64_t result_tensor_bytes = 0;
  // Opaque: what the tensors are.
  std::string result_header;
  double relative_error = 0;
  double lambda_used = 0;

  bool operator==(const JobRecord&) const = default;
};

// Everything there is, for the start of a server.
struct StoredState {
  std::vector<CalibrationRecord> calibrations;
  // By number.
  std::vector<JobRecord> jobs;
};

// Bytes on their way into the store. What was not committed vanishes with the writer. Not
// thread-safe.
class BlobWriter {
 public:
  virtual ~BlobWriter() = default;
  virtual absl::Status Append(std::span<const std::byte> bytes) = 0;
  // Makes the bytes durable under a name of the store's choosing. Until a record names the blob,
  // the next start removes it.
  virtual absl::StatusOr<BlobRef> Commit() = 0;
};

// Thread-safe. Stays usable when the blob is deleted meanwhile.
class BlobReader {
 public:
  virtual ~BlobReader() = default;
  virtual int64_t bytes() const = 0;
  // Fills `to` from `offset`; every byte is checked. DATA_LOSS, with the file's name, where what
  // is stored is not what was written. REQUIRES: 0 <= offset, offset + to.size() <= bytes().
  virtual absl::Status Read(int64_t offset, std::span<std::byte> to) const = 0;
};

// Thread-safe. Errors of every method unless said otherwise: RESOURCE_EXHAUSTED with a retry delay
// (status_details.h) where the disk is full, UNAVAILABLE with one where the disk fails otherwise,
// DATA_LOSS naming the file where it holds something else than was written. After an error the
// store is as it was before the call, and stays usable.
class Store {
 public:
  virtual ~Store() = default;

  // False: everything goes with the process.
  virtual bool durable() const = 0;

  // The records that are there; once, before anything else. Blobs that no record names are removed.
  virtual absl::StatusOr<StoredState> Load() = 0;

  virtual absl::StatusOr<std::unique_ptr<BlobWriter>> CreateBlob() = 0;
  // NOT_FOUND is DATA_LOSS here: a record promised it.
  virtual absl::StatusOr<std::unique_ptr<BlobReader>> OpenBlob(const BlobRef& blob) = 0;
  // For blobs that no record names any more. Failing to delete is no error: the next start tries
  // again.
  virtual void DeleteBlob(const BlobRef& blob) = 0;

  // Writes a record whole, durable when it returns OK: all of it or nothing. Blobs that it no
  // longer names stay until DeleteBlob.
  virtual absl::Status PutCalibration(const CalibrationRecord& record) = 0;
  virtual absl::Status PutJob(const JobRecord& record) = 0;
  // No error where there is none. A full disk does not keep records from being deleted.
  virtual absl::Status DeleteCalibration(const std::string& id) = 0;
  virtual absl::Status DeleteJob(const std::string& id) = 0;
};

}  // namespace certiq::server

#endif  // CERTIQ_STORE_STORE_H_
