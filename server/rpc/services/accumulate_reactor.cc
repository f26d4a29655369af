#include "rpc/services/accumulate_reactor.h"

#include <span>
#include <utility>

#include "absl/strings/str_cat.h"
#include "base/status.h"

namespace certiq::server {
namespace {

// What an open stream takes beside the messages of the moment, which gRPC's own quota bounds.
constexpr int64_t kStreamBytes = int64_t{64} << 10;

std::span<const std::byte> AsBytes(const std::string& data) {
  return std::as_bytes(std::span(data.data(), data.size()));
}

absl::Status NoHeader() {
  return base::InvalidField("header", "expected as the first message, and only there");
}

}  // namespace

absl::Status AccumulateReactor::First(const Bytes& message) {
  const auto request = Parse<v1::AccumulateRequest>(message, "an AccumulateRequest");
  if (!request.ok()) return request.status();
  if (!request->has_header()) return NoHeader();
  if (absl::Status draining = Draining(); !draining.ok()) return draining;
  const v1::AccumulateHeader& header = request->header();
  auto calibration = env_.calibrations.Find(tenant_, header.calibration_id());
  if (!calibration.ok()) return calibration.status();
  const absl::StatusOr<AccumulateCall> call = FromProto(header, (*calibration)->mismatched());
  if (!call.ok()) return call.status();
  Account& account = env_.jobs.accounts.Of(tenant_);
  absl::StatusOr<CountQuota::Place> place = account.streams.Take("streams");
  if (!place.ok()) {
    env_.jobs.observer.Rejected(Rejection::kQuota);
    return place.status();
  }
  auto reservation = account.memory.TryReserve(kStreamBytes, "this stream");
  if (!reservation.ok()) {
    env_.jobs.observer.Rejected(Rejection::kOverBudget);
    return reservation.status();
  }
  place_ = *std::move(place);
  reservation_ = *std::move(reservation);
  live_ = std::make_shared<LiveStream>(call->stream_id, call->x, call->x_quantized,
                                       [this] { OnStreamChanged(); });
  calibration_ = *std::move(calibration);
  life_.summary.features = calibration_->features();
  life_.summary.calibration_id = calibration_->id();
  life_.summary.stream_id = call->stream_id;
  return absl::OkStatus();
}

absl::Status AccumulateReactor::Post(WorkerPool::Task task) {
  if (calibration_ == nullptr) return env_.jobs.pool.Post(std::move(task));
  return calibration_->strand().Post(std::move(task));
}

absl::Status AccumulateReactor::Take(const Bytes& message) {
  if (!opened_) {
    // The header itself.
    absl::Status opened = calibration_->Open(live_);
    opened_ = opened.ok();
    const std::lock_guard lock(mu_);
    answering_ = opened.ok();
    return opened;
  }
  const auto request = Parse<v1::AccumulateRequest>(message, "an AccumulateRequest");
  if (!request.ok()) return request.status();
  if (!request->has_chunk()) return NoHeader();
  const v1::AccumulateChunk& chunk = request->chunk();
  return calibration_->Fold(*live_, chunk.sequence(), AsBytes(chunk.x()),
                            AsBytes(chunk.x_quantized()));
}

absl::Status AccumulateReactor::End() {
  if (!opened_) return NoHeader();
  return calibration_->Commit();
}

void AccumulateReactor::OnStreamChanged() {
  const absl::Status ended = calibration_->Look(*live_).second;
  if (ended.ok()) {
    Changed();
  } else {
    Fail(ended);
  }
}

bool AccumulateReactor::Next(Bytes* outgoing) {
  if (!answering_) return false;
  const auto [view, ended] = calibration_->Look(*live_);
  if (!ended.ok()) {
    SetFailure(ended);
    return false;
  }
  if (said_.has_value() && said_->received == view.received && said_->durable == view.durable) {
    return false;
  }
  v1::AccumulateResponse response;
  *response.mutable_progress() = ToProto(view);
  said_ = view;
  life_.summary.tokens = view.tokens;
  return Serialize(response, outgoing);
}

void AccumulateReactor::Drop() {
  if (live_ != nullptr) calibration_->Close(*live_);
  reservation_.Release();
  place_ = CountQuota::Place();
}

void AccumulateReactor::Gone() {
  if (live_ != nullptr) live_->changed.Detach();
}

absl::Status ImportReactor::First(const Bytes& message) {
  const auto request = Parse<v1::ImportStatisticsRequest>(message, "an ImportStatisticsRequest");
  if (!request.ok()) return request.status();
  if (!request->has_header()) return NoHeader();
  if (absl::Status draining = Draining(); !draining.ok()) return draining;
  auto calibration = env_.calibrations.Find(tenant_, request->header().calibration_id());
  if (!calibration.ok()) return calibration.status();
  absl::StatusOr<ImportCall> call = FromProto(request->header(), **calibration);
  if (!call.ok()) return call.status();
  Account& account = env_.jobs.accounts.Of(tenant_);
  absl::StatusOr<CountQuota::Place> place = account.streams.Take("streams");
  if (!place.ok()) {
    env_.jobs.observer.Rejected(Rejection::kQuota);
    return place.status();
  }
  auto reservation = account.memory.TryReserve(
      StatisticsImport::BytesFor((*calibration)->features(), (*calibration)->mismatched()),
      "importing these sums");
  if (!reservation.ok()) {
    env_.jobs.observer.Rejected(Rejection::kOverBudget);
    return reservation.status();
  }
  place_ = *std::move(place);
  reservation_ = *std::move(reservation);
  call_ = *std::move(call);
  calibration_ = *std::move(calibration);
  life_.summary.features = calibration_->features();
  life_.summary.calibration_id = calibration_->id();
  life_.summary.stream_id = call_.stream_id;
  life_.summary.tokens = call_.tokens;
  return absl::OkStatus();
}

absl::Status ImportReactor::Post(WorkerPool::Task task) {
  // Bytes are parsed beside other streams' work; only adding them needs the strand.
  if (calibration_ == nullptr || !half_closed()) return env_.jobs.pool.Post(std::move(task));
  return calibration_->strand().Post(std::move(task));
}

absl::Status ImportReactor::Take(const Bytes& message) {
  if (!header_taken_) {
    header_taken_ = true;
    sums_.emplace(calibration_->features(), calibration_->mismatched(), call_.dtype, call_.layout);
    return absl::OkStatus();
  }
  const auto request = Parse<v1::ImportStatisticsRequest>(message, "an ImportStatisticsRequest");
  if (!request.ok()) return request.status();
  if (request->payload_case() != v1::ImportStatisticsRequest::kData) return NoHeader();
  return sums_->Append(AsBytes(request->data()));
}

absl::Status ImportReactor::End() {
  if (!header_taken_) return NoHeader();
  const absl::StatusOr<engine::Statistics> sums = sums_->Finish(call_.tokens);
  if (!sums.ok()) return sums.status();
  const absl::StatusOr<bool> known = calibration_->Import(call_.stream_id, call_.held_out, *sums);
  if (!known.ok()) return known.status();
  v1::ImportStatisticsResponse response;
  response.set_already_committed(*known);
  *response.mutable_calibration() = ToProto(calibration_->View(true));
  return Serialize(response, response_) ? absl::OkStatus()
                                        : absl::InternalError("a response could not be serialized");
}

void ImportReactor::Drop() {
  sums_.reset();
  reservation_.Release();
  place_ = CountQuota::Place();
}

}  // namespace certiq::server
