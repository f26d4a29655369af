// Results: how they are stored, and how they are read.

#ifndef CERTIQ_JOB_RESULT_H_
#define CERTIQ_JOB_RESULT_H_

#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "certiq/v1/certificate.pb.h"
#include "contract/certificate.h"
#include "engine/quantize_layer.h"
#include "store/blobs.h"

namespace certiq::server {

// Bytes of a result in one message, unless one row is larger. Clients accept 4 MiB by default; this
// is small enough that a call's progress shows.
inline constexpr int64_t kFrameBytes = int64_t{1} << 20;

// Writes the tensors and the certificate of a layer as one blob.
absl::StatusOr<ResultRecord> WriteResult(const engine::QuantizedLayer& layer,
                                         const CertificateFacts& facts, Blobs& blobs);

// The same bytes without a store: the tensors as they are, then the certificate.
ResultRecord DescribeResult(const engine::QuantizedLayer& layer);
std::unique_ptr<BlobReader> MakeResultBlob(engine::QuantizedLayer layer,
                                           const CertificateFacts& facts);

// Reads a result in order: bytes of the tensors from an offset on, then the certificate's parts.
// Errors are DATA_LOSS where the blob is not what the record says. Not thread-safe.
class ResultReader {
 public:
  ResultReader(ResultRecord record, std::unique_ptr<BlobReader> blob, int64_t offset)
      : record_(std::move(record)), blob_(std::move(blob)), offset_(offset) {}

  const ResultRecord& record() const { return record_; }
  // The next byte, of those of the tensors and after.
  int64_t offset() const { return offset_; }
  bool at_tensors() const { return offset_ < record_.tensor_bytes(); }
  bool at_end() const { return offset_ >= blob_->bytes(); }

  // The next `bytes` bytes of the tensors. REQUIRES: so many are left.
  absl::Status ReadBytes(int64_t bytes, std::string& to);
  // The next part of the certificate. REQUIRES: !at_tensors() && !at_end().
  absl::Status ReadCertificate(v1::Certificate& part);

 private:
  absl::Status Read(std::span<std::byte> to);

  const ResultRecord record_;
  const std::unique_ptr<BlobReader> blob_;
  int64_t offset_;
};

}  // namespace certiq::server

#endif  // CERTIQ_JOB_RESULT_H_
