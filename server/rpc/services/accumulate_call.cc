#include "rpc/services/accumulate_call.h"

#include <utility>

#include "absl/strings/str_cat.h"
#include "base/status_macros.h"
#include "certiq/v1/calibration_service.pb.h"
#include "rpc/services/convert_calibration.h"

namespace certiq::server {
namespace {

// What an open stream takes beside the messages of the moment, which gRPC's own quota bounds.
constexpr int64_t kStreamBytes = int64_t{64} << 10;

}  // namespace

absl::StatusOr<StreamHoldings> HoldStream(const Environment& environment, const Tenant& tenant,
                                          int64_t bytes, absl::string_view what) {
  TenantQuota& quota = environment.quotas.Of(tenant);
  absl::StatusOr<CountQuota::Permit> permit = quota.streams.Take("streams");
  if (!permit.ok()) {
    environment.observer.Rejected(Rejection::kQuota);
    return permit.status();
  }
  absl::StatusOr<ByteBudget::Reservation> memory = quota.memory.TryReserve(bytes, what);
  if (!memory.ok()) {
    environment.observer.Rejected(Rejection::kOverBudget);
    return memory.status();
  }
  return StreamHoldings{*std::move(permit), *std::move(memory)};
}

absl::Status AccumulateCall::Take(const Bytes& message) {
  ASSIGN_OR_RETURN(const v1::AccumulateRequest request,
                   Parse<v1::AccumulateRequest>(message, "an AccumulateRequest"));
  if (sums_ == nullptr) return TakeHeader(request);
  if (!request.has_chunk()) return HeaderMisplaced();
  // Opening failed, and has said why.
  if (!opened_) return absl::CancelledError("the stream is not open");
  return sums_->Fold(*live_, request.chunk().sequence(), AsBytes(request.chunk().x()),
                     AsBytes(request.chunk().x_quantized()));
}

absl::Status AccumulateCall::TakeHeader(const v1::AccumulateRequest& request) {
  if (!request.has_header()) return HeaderExpected(request.has_chunk() ? "chunk" : "none");
  const v1::AccumulateHeader& header = request.header();
  ASSIGN_OR_RETURN(const CalibrationRecord record,
                   env_.calibrations.Find(tenant_, header.calibration_id()));
  ASSIGN_OR_RETURN(const AccumulateRequest asked,
                   ReadAccumulateHeader(header, record.mismatched()));
  ASSIGN_OR_RETURN(holdings_, HoldStream(env_.environment, tenant_, kStreamBytes, "this stream"));
  ASSIGN_OR_RETURN(std::shared_ptr<PartialSums> sums,
                   env_.calibrations.Partial(tenant_, header.calibration_id()));
  if (sums == nullptr) return FinalizedError();
  live_ = std::make_shared<LiveStream>(asked.stream_id, asked.x, asked.x_quantized,
                                       [this] { OnStreamChanged(); });
  life_.summary.features = record.features();
  life_.summary.calibration_id = record.id();
  life_.summary.stream_id = asked.stream_id;
  sums_ = std::move(sums);
  // It is opened in the strand, ahead of the first chunk.
  WorkStarted([](absl::StatusCode /*reason*/) {});
  absl::Status posted =
      sums_->strand().Post({.run =
                                [this] {
                                  absl::Status opened = sums_->Open(live_);
                                  opened_ = opened.ok();
                                  return opened;
                                },
                            .done = [this](absl::Status status) { WorkEnded(std::move(status)); }});
  // A shutdown: nobody else ends the work.
  if (!posted.ok()) WorkEnded(posted);
  return posted;
}

absl::Status AccumulateCall::Post(WorkerPool::Task task) {
  if (sums_ == nullptr) return env_.environment.pool.Post(std::move(task));
  return sums_->strand().Post(std::move(task));
}

absl::Status AccumulateCall::End() {
  if (sums_ == nullptr) return HeaderMissing();
  return sums_->Commit();
}

void AccumulateCall::OnStreamChanged() {
  if (const absl::Status reason = sums_->Look(*live_).second; !reason.ok()) {
    Fail(reason);
  } else {
    Changed();
  }
}

absl::StatusOr<AccumulateCall::Produced> AccumulateCall::Produce(Bytes* outgoing) {
  // Asked before the position is looked at: what is said last includes the last commit.
  const bool last = ended();
  const auto [view, reason] = sums_->Look(*live_);
  RETURN_IF_ERROR(reason);
  // Nothing is said before the stream is open.
  if (!view.live) return last ? Produced::kEnd : Produced::kNothingYet;
  if (said_.has_value() && said_->received == view.received && said_->durable == view.durable) {
    return last ? Produced::kEnd : Produced::kNothingYet;
  }
  v1::AccumulateResponse response;
  *response.mutable_progress() = ToProto(view);
  said_ = view;
  life_.summary.tokens = view.tokens;
  RETURN_IF_ERROR(Serialize(response, outgoing));
  return Produced::kMessage;
}

void AccumulateCall::Drop() {
  if (live_ != nullptr) sums_->Close(*live_);
  holdings_ = StreamHoldings();
}

void AccumulateCall::Gone() {
  if (live_ != nullptr) live_->changed.Detach();
}

}  // namespace certiq::server
