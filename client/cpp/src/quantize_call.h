// One try of a Quantize call.
#ifndef CERTIQ_CLIENT_CPP_SRC_QUANTIZE_CALL_H_
#define CERTIQ_CLIENT_CPP_SRC_QUANTIZE_CALL_H_

#include <atomic>
#include <cstdint>

#include "absl/status/status.h"
#include "absl/strings/string_view.h"
#include "absl/time/time.h"
#include "base/mutex.h"
#include "certiq/client.h"
#include "certiq/retry.h"
#include "certiq/v1/quantization_service.grpc.pb.h"
#include "result_collector.h"
#include "retry_loop.h"

namespace certiq {

// The life of a try:
//   1. Run() opens the stream and starts a reader thread.
//   2. The calling thread writes the header, the weights, the activations, and half-closes. It
//      stops at once when a write fails or the reader has seen the end.
//   3. The reader hands frames to the collector until the stream ends. A frame that breaks the
//      contract cancels the stream, which also ends a write that is blocked.
//   4. Both joined, Run() asks for the status. What was found here goes first, then the server's
//      status, and only an OK one lets the collector decide.
// An object serves one call of Run(), which uses two threads itself.
class QuantizeCall {
 public:
  // REQUIRES: CheckRequest(request).ok(). All arguments must outlive this object.
  QuantizeCall(v1::QuantizationService::StubInterface* stub, const QuantizeRequestData& request,
               const QuantizeOptions& options, int64_t chunk_bytes);

  // `deadline` is for the whole call. `*result` is set where the outcome is OK.
  AttemptOutcome Run(absl::Time deadline, QuantizeResult* result);

 private:
  using Stream = grpc::ClientReaderWriterInterface<v1::QuantizeRequest, v1::QuantizeResponse>;

  // False where the server did not take everything.
  bool Upload(Stream* stream);
  bool UploadWeight(Stream* stream);
  bool UploadActivations(Stream* stream);
  bool Send(Stream* stream, const v1::QuantizeRequest& frame, size_t tensor_bytes);
  void ReadAll(Stream* stream, CallContext* context);
  void Report(const ProgressEvent& event);

  v1::QuantizationService::StubInterface* const stub_;
  const QuantizeRequestData& request_;
  const QuantizeOptions& options_;
  const int64_t chunk_bytes_;
  const int64_t total_bytes_;

  // Held while progress is reported, so that the caller gets one event at a time.
  base::Mutex progress_mutex_;
  std::atomic<bool> reading_ended_{false};

  // Belong to the writer; Run() reads them after the upload.
  int64_t sent_bytes_ = 0;
  bool wrote_ = false;

  // Belong to the reader; Run() reads them after the join.
  ResultCollector collector_;
  absl::Status read_error_;
  bool read_ = false;
};

}  // namespace certiq

#endif  // CERTIQ_CLIENT_CPP_SRC_QUANTIZE_CALL_H_
