// The stored records: protobuf messages, defined once in proto/certiq/internal/stored.proto.

#ifndef CERTIQ_STORE_RECORDS_H_
#define CERTIQ_STORE_RECORDS_H_

#include <cstdint>

#include "certiq/internal/stored.pb.h"
#include "contract/job_state.h"

namespace certiq::server {

using CalibrationRecord = internal::StoredCalibration;
using StreamRecord = internal::StoredStream;
using JobRecord = internal::StoredJob;
using ResultRecord = internal::StoredResult;
// Names immutable bytes in the blob store; an empty name stands for none.
using BlobRef = internal::Blob;

// What a record takes in the store beside its blobs, about: its row, its index entries and the room
// that pages leave unused.
template <typename Record>
int64_t RecordBytes(const Record& record) {
  return 2 * static_cast<int64_t>(record.ByteSizeLong()) + 1024;
}
// What a blob of `bytes` bytes takes: files are whole blocks.
inline int64_t BlobBytes(int64_t bytes) { return (bytes + 4095) / 4096 * 4096; }

// When a job that has ended is deleted; 0 where it has not ended.
inline int64_t ExpireTime(const JobRecord& job) {
  return IsFinal(job.state()) ? job.end_time() + job.ttl_micros() : 0;
}
inline int64_t ExpireTime(const CalibrationRecord& calibration) {
  return calibration.update_time() + calibration.ttl_micros();
}

}  // namespace certiq::server

#endif  // CERTIQ_STORE_RECORDS_H_
