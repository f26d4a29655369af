// CalibrationService.Accumulate: rows into a calibration.

#ifndef CERTIQ_RPC_SERVICES_ACCUMULATE_CALL_H_
#define CERTIQ_RPC_SERVICES_ACCUMULATE_CALL_H_

#include <memory>
#include <optional>
#include <utility>

#include "calibration/partial_sums.h"
#include "certiq/v1/calibration_service.pb.h"
#include "rpc/calls/call.h"
#include "runtime/byte_budget.h"
#include "runtime/tenant_quota.h"

namespace certiq::server {

// What an open stream of rows or sums holds.
struct StreamHoldings {
  CountQuota::Permit permit;
  ByteBudget::Reservation memory;
};
// RESOURCE_EXHAUSTED where the tenant has no stream left, or `bytes` do not fit; `what` says for
// whom: "this stream".
absl::StatusOr<StreamHoldings> HoldStream(const Environment& environment, const Tenant& tenant,
                                          int64_t bytes, absl::string_view what);

// Chunks are folded in the calibration's strand; after each the position is written, the latest for
// slow readers. The call ends when everything is durable.
class AccumulateCall final : public Call {
 public:
  explicit AccumulateCall(CallStart start) : Call(std::move(start), OnDrain::kEnd) {}

 protected:
  absl::Status Take(const Bytes& message) override;
  absl::Status End() override;
  absl::StatusOr<Produced> Produce(Bytes* outgoing) override;
  absl::Status Post(WorkerPool::Task task) override;
  void Drop() override;
  void Gone() override;

 private:
  absl::Status TakeHeader(const v1::AccumulateRequest& request);
  void OnStreamChanged();

  // Set by the header, then unchanged.
  std::shared_ptr<PartialSums> sums_;
  std::shared_ptr<LiveStream> live_;
  StreamHoldings holdings_;
  // Take's: the stream was opened.
  bool opened_ = false;
  // Produce's: what was written last.
  std::optional<StreamView> said_;
};

}  // namespace certiq::server

#endif  // CERTIQ_RPC_SERVICES_ACCUMULATE_CALL_H_
