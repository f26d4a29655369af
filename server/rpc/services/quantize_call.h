// QuantizationService.Quantize: the upload, the run and the result of a job that no store keeps.

#ifndef CERTIQ_RPC_SERVICES_QUANTIZE_CALL_H_
#define CERTIQ_RPC_SERVICES_QUANTIZE_CALL_H_

#include <cstdint>
#include <deque>
#include <memory>
#include <optional>
#include <utility>

#include "absl/base/thread_annotations.h"
#include "base/mutex.h"
#include "certiq/v1/quantization_service.pb.h"
#include "job/call_run.h"
#include "job/upload.h"
#include "rpc/calls/call.h"

namespace certiq::server {

// The header is admitted as CreateJob's is; then weights and activations are taken, the layer waits
// and runs, and the result is sent. Progress is written as it comes; what a slow reader has no room
// for is coalesced: the latest of each phase.
class QuantizeCall final : public Call {
 public:
  explicit QuantizeCall(CallStart start) : Call(std::move(start), OnDrain::kRefuse) {}

 protected:
  absl::Status Take(const Bytes& message) override;
  absl::Status End() override;
  absl::StatusOr<Produced> Produce(Bytes* outgoing) override;
  void Drop() override;

 private:
  absl::Status TakeHeader(const v1::QuantizeRequest& request);
  void PushProgress(engine::Phase phase, double fraction);
  // The next frame of the result.
  absl::StatusOr<Produced> ProduceResult(Bytes* outgoing);

  // Take's and End's; given back when the call is over.
  std::unique_ptr<Upload> upload_;

  base::Mutex progress_mu_;
  std::deque<v1::Progress> progress_ ABSL_GUARDED_BY(progress_mu_);
  // Set when the run has ended; Produce's from then on.
  std::optional<CallResult> result_ ABSL_GUARDED_BY(progress_mu_);
  // Produce's: whether the result's header was sent, and where in its tensors the reader is.
  bool header_sent_ = false;
  int tensor_ = 0;
  int64_t row_ = 0;
};

}  // namespace certiq::server

#endif  // CERTIQ_RPC_SERVICES_QUANTIZE_CALL_H_
