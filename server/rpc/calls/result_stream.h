// A result, frame by frame.

#ifndef CERTIQ_RPC_CALLS_RESULT_STREAM_H_
#define CERTIQ_RPC_CALLS_RESULT_STREAM_H_

#include <cstdint>
#include <vector>

#include "certiq/v1/quantization_service.pb.h"
#include "contract/convert.h"
#include "engine/quantize_layer.h"
#include "job/quantize_job.h"
#include "runtime/byte_budget.h"

namespace certiq::server {

// Bytes of rows in one frame, unless one row is larger. Clients accept 4 MiB by default; small
// enough that a call's progress shows.
inline constexpr int64_t kResultFrameBytes = int64_t{1} << 20;

// The frames that follow progress: result header, chunks of whole rows, certificate. Holds
// the result's reservation; gives tensors back as they are sent. Not thread-safe.
class ResultStream {
 public:
  // `facts` lacks queue_seconds, which the result has.
  ResultStream(QuantizeResult result, CallFacts facts, int64_t frame_bytes = kResultFrameBytes);

  // Fills the next frame; false when there is none left.
  bool Next(v1::QuantizeResponse& frame);

 private:
  ByteBudget::Reservation reservation_;
  const int64_t frame_bytes_;
  std::vector<engine::ResultTensor> tensors_;
  std::vector<v1::Certificate> certificates_;
  bool header_sent_ = false;
  size_t tensor_ = 0;
  int64_t row_ = 0;  // of tensors_[tensor_], the next to send
  size_t certificate_ = 0;
};

}  // namespace certiq::server

#endif  // CERTIQ_RPC_CALLS_RESULT_STREAM_H_
