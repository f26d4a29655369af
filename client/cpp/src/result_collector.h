// Assembly and validation of the frames of a result.
#ifndef CERTIQ_CLIENT_CPP_SRC_RESULT_COLLECTOR_H_
#define CERTIQ_CLIENT_CPP_SRC_RESULT_COLLECTOR_H_

#include <cstdint>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "certiq/client.h"
#include "certiq/v1/job_service.pb.h"
#include "certiq/v1/quantization_service.pb.h"

namespace certiq {

// Order of the frames: result header, the tensors' bytes, certificate; progress anywhere. The bytes
// come as chunks (each tensor's rows in order) from Quantize, as runs of all tensors' bytes from
// ReadResult, which may begin where an earlier stream broke. Memory is bounded by what a [rows,
// features] layer can come to, whatever the header claims. Not thread-safe.
class ResultCollector {
 public:
  // The shape of the weights that were sent.
  ResultCollector(int64_t rows, int64_t features);

  // Takes a frame other than progress. INTERNAL where it breaks the contract; nothing after that
  // makes sense.
  absl::Status Add(const v1::QuantizeResponse& frame);
  absl::Status Add(const v1::ReadResultResponse& frame);

  // A new stream of ReadResult begins: the same header again, then the bytes from received_bytes()
  // on, then the whole certificate.
  void Resume();

  // Bytes of all tensors so far.
  int64_t received_bytes() const { return received_bytes_; }

  // Whether a result header came, in any stream.
  bool started() const { return started_; }

  // After the server said OK: the result, or DATA_LOSS naming what is missing.
  absl::StatusOr<QuantizeResult> Finish() &&;

  // The most bytes a result of such a layer may announce.
  static int64_t MaxResultBytes(int64_t rows, int64_t features);

 private:
  absl::Status AddHeader(const v1::ResultHeader& header);
  absl::Status AddChunk(const v1::ResultChunk& chunk);
  absl::Status AddBytes(const v1::ResultBytes& bytes);
  absl::Status AddCertificate(const v1::Certificate& certificate);
  // The first tensor that misses rows; size() if none does.
  size_t FirstIncomplete() const;

  const int64_t rows_;
  const int64_t features_;
  bool started_ = false;
  // Whether the current stream has brought its header.
  bool header_came_ = false;
  v1::ResultHeader header_;
  int64_t received_bytes_ = 0;
  bool certificate_started_ = false;
  uint64_t certificate_bytes_ = 0;
  std::vector<int64_t> row_bytes_;
  std::vector<int64_t> expected_bytes_;
  QuantizeResult result_;
};

}  // namespace certiq

#endif  // CERTIQ_CLIENT_CPP_SRC_RESULT_COLLECTOR_H_
