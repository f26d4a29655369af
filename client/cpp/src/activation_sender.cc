#include "activation_sender.h"

#include <algorithm>
#include <utility>

#include "absl/strings/str_cat.h"
#include "base/status_macros.h"
#include "certiq/status.h"
#include "request_check.h"
#include "rows.h"

namespace certiq {

ActivationStream::ActivationStream(std::unique_ptr<Sender> sender) : sender_(std::move(sender)) {}
ActivationStream::~ActivationStream() = default;

absl::Status ActivationStream::Write(const TensorView& x,
                                     const std::optional<TensorView>& x_quantized) {
  return sender_->Write(x, x_quantized);
}

absl::StatusOr<v1::StreamProgress> ActivationStream::Close() { return sender_->Close(); }

ActivationStream::Sender::Sender(
    std::shared_ptr<const ServiceConnection<v1::CalibrationService>> connection,
    StreamOptions stream, int64_t chunk_rows, CallOptions options)
    : connection_(std::move(connection)),
      stream_(std::move(stream)),
      options_(std::move(options)),
      retry_loop_(connection_->options, options_),
      window_(chunk_rows) {}

absl::Status ActivationStream::Sender::Write(const TensorView& x,
                                             const std::optional<TensorView>& x_quantized) {
  RETURN_IF_ERROR(failed_);
  RETURN_IF_ERROR(CheckRows(x, x_quantized));
  const int64_t rows = x.shape[0];
  for (int64_t row = 0; row < rows;) {
    const int64_t count = std::min(window_.room(), rows - row);
    const bool completed = window_.Append(
        count, Rows(x, row, count), x_quantized.has_value() ? Rows(*x_quantized, row, count) : "");
    row += count;
    if (!completed) continue;
    if (absl::Status status = SendWhatIsThere(); !status.ok()) return Remember(status);
  }
  return absl::OkStatus();
}

absl::StatusOr<v1::StreamProgress> ActivationStream::Sender::Close() {
  RETURN_IF_ERROR(failed_);
  window_.Flush();
  RETURN_IF_ERROR(Remember(SendAllAndFinish()));
  failed_ = absl::FailedPreconditionError("the stream was closed");
  return last_;
}

absl::Status ActivationStream::Sender::CheckRows(
    const TensorView& x, const std::optional<TensorView>& x_quantized) const {
  RETURN_IF_ERROR(CheckActivations(x, x_quantized));
  const v1::DataType quantized =
      x_quantized.has_value() ? x_quantized->dtype : v1::DATA_TYPE_UNSPECIFIED;
  if (x.dtype == stream_.x && quantized == stream_.x_quantized && x.shape[1] == stream_.features) {
    return absl::OkStatus();
  }
  return FieldError(
      absl::StatusCode::kInvalidArgument, "x",
      absl::StrCat("expected rows of ", stream_.features, " ", DataTypeName(stream_.x),
                   " with x_quantized ", DataTypeName(stream_.x_quantized), ", got ", x.shape[1],
                   " ", DataTypeName(x.dtype), " with ", DataTypeName(quantized)));
}

absl::Status ActivationStream::Sender::EnsureOpen() {
  while (call_ == nullptr) {
    v1::AccumulateHeader header;
    header.set_calibration_id(stream_.calibration_id);
    header.set_stream_id(stream_.stream_id);
    header.set_x(stream_.x);
    header.set_x_quantized(stream_.x_quantized);
    call_ = std::make_unique<AccumulateCall>(connection_->stub.get(), header,
                                             retry_loop_.deadline(), options_.cancel);
    const std::optional<v1::StreamProgress> first = call_->WaitForFirst();
    if (!first.has_value()) {
      RETURN_IF_ERROR(Recover(false));
      continue;
    }
    // What was durable once must stay: it is not kept here any more.
    if (first->received() < window_.first()) {
      return absl::DataLossError(
          absl::StrCat("the server lost chunks of stream \"", stream_.stream_id,
                       "\" that it had called durable: it asks for ", first->received(),
                       ", and those before ", window_.first(), " are gone here"));
    }
    if (!opened_once_) furthest_ = first->received();
    opened_once_ = true;
    position_ = first->received();
    unchecked_ = first;
  }
  return absl::OkStatus();
}

absl::Status ActivationStream::Sender::SendWhatIsThere() {
  for (;;) {
    RETURN_IF_ERROR(EnsureOpen());
    RETURN_IF_ERROR(CheckPosition());
    if (SendPending()) {
      RETURN_IF_ERROR(DropDurable());
      if (window_.bytes() <= stream_.window_bytes) return absl::OkStatus();
      if (call_->WaitForDurableBeyond(window_.first())) continue;
    }
    RETURN_IF_ERROR(Recover(false));
  }
}

absl::Status ActivationStream::Sender::SendAllAndFinish() {
  for (;;) {
    RETURN_IF_ERROR(SendWhatIsThere());
    if (position_ > window_.next()) {
      return absl::FailedPreconditionError(
          absl::StrCat("stream \"", stream_.stream_id, "\": the server holds ", position_,
                       " chunks of it, but there were only ", window_.next(),
                       " to write: these are other rows"));
    }
    call_->CloseAndWait();
    RETURN_IF_ERROR(Recover(true));
    if (finished_) return absl::OkStatus();
  }
}

absl::Status ActivationStream::Sender::CheckPosition() {
  if (!unchecked_.has_value() || unchecked_->received() > window_.next()) return absl::OkStatus();
  const int64_t rows = window_.RowsBefore(unchecked_->received());
  const int64_t tokens = unchecked_->tokens();
  unchecked_.reset();
  if (rows == tokens) return absl::OkStatus();
  return absl::FailedPreconditionError(absl::StrCat(
      "stream \"", stream_.stream_id, "\": the server holds ", tokens,
      " tokens in its first chunks, here these have ", rows,
      " rows: the stream was begun with other types, other rows or another chunk_rows"));
}

bool ActivationStream::Sender::SendPending() {
  while (position_ < window_.next()) {
    if (!call_->Send(window_.chunk(position_))) return false;
    ++position_;
    Report();
  }
  return true;
}

absl::Status ActivationStream::Sender::DropDurable() {
  const v1::StreamProgress progress = call_->latest();
  if (progress.received() > position_) {
    return absl::InternalError(absl::StrCat(
        "the server's answer breaks the contract: progress.received: expected at most ", position_,
        ", which is what was sent, got ", progress.received()));
  }
  window_.DropBefore(progress.durable());
  return absl::OkStatus();
}

absl::Status ActivationStream::Sender::Recover(bool everything_sent) {
  AttemptOutcome outcome = call_->Finish();
  const v1::StreamProgress progress = call_->latest();
  call_.reset();
  unchecked_.reset();
  if (outcome.status.ok() && everything_sent && progress.durable() == window_.next()) {
    last_ = progress;
    finished_ = true;
    return absl::OkStatus();
  }
  if (outcome.status.ok()) {
    outcome.status = absl::InternalError(
        absl::StrCat("the server's answer breaks the contract: the call ended with ",
                     progress.durable(), " of ", window_.next(), " chunks durable"));
    outcome.local = true;
  }
  outcome.resumable = opened_once_;
  // While the call was open the caller may have had nothing to send.
  if (!progress.stream_id().empty()) outcome.elapsed = absl::ZeroDuration();
  outcome.progressed = progress.received() > furthest_;
  furthest_ = std::max(furthest_, progress.received());
  return retry_loop_.Next(outcome);
}

absl::Status ActivationStream::Sender::Remember(absl::Status status) {
  if (!status.ok()) {
    failed_ = status;
    call_.reset();
  }
  return status;
}

void ActivationStream::Sender::Report() {
  if (!options_.progress) return;
  const int64_t row_bytes =
      stream_.features * (DataTypeBytes(stream_.x) + DataTypeBytes(stream_.x_quantized));
  options_.progress(UploadProgress{
      .bytes = window_.RowsBefore(position_) * row_bytes,
      .total_bytes = std::max(stream_.expected_rows, window_.RowsBefore(position_)) * row_bytes});
}

}  // namespace certiq
