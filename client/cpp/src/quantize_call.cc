#include "quantize_call.h"

#include <algorithm>
#include <memory>
#include <optional>
#include <string>
#include <thread>
#include <utility>

#include "absl/strings/match.h"
#include "certiq/status.h"
#include "request_check.h"

namespace certiq {
namespace {

// `count` rows from `first` on of a matrix of `rows` rows.
absl::string_view Rows(const TensorView& matrix, int64_t first, int64_t count) {
  const size_t row_bytes = matrix.data.size() / static_cast<size_t>(matrix.shape[0]);
  return matrix.data.substr(static_cast<size_t>(first) * row_bytes,
                            static_cast<size_t>(count) * row_bytes);
}

int64_t RowBytes(const std::optional<TensorView>& matrix) {
  return matrix.has_value() ? static_cast<int64_t>(matrix->data.size()) / matrix->shape[0] : 0;
}

// Whether the status is a server's. One that refuses before it reads anything leaves neither a
// write nor a read behind; but once there is a connection, the peer has an address family.
bool Answered(const grpc::ClientContext& context, const grpc::Status& status) {
  const std::string peer = context.peer();
  return status.error_code() != grpc::StatusCode::UNAVAILABLE || absl::StartsWith(peer, "ipv4:") ||
         absl::StartsWith(peer, "ipv6:");
}

}  // namespace

QuantizeCall::QuantizeCall(v1::QuantizationService::StubInterface* stub,
                           const QuantizeRequestData& request, const QuantizeOptions& options,
                           int64_t chunk_bytes)
    : stub_(stub),
      request_(request),
      options_(options),
      chunk_bytes_(chunk_bytes),
      total_bytes_(UploadBytes(request)),
      collector_(request.weight.shape[0], request.weight.shape[1]) {}

AttemptOutcome QuantizeCall::Run(absl::Time deadline, QuantizeResult* result) {
  const absl::Time start = absl::Now();
  if (deadline != absl::InfiniteFuture()) context_.set_deadline(absl::ToChronoTime(deadline));
  // Runs at once if the token was stopped before; gone before the context is.
  const std::stop_callback cancel(options_.cancel, [this] { context_.TryCancel(); });

  const std::unique_ptr<Stream> stream = stub_->Quantize(&context_);
  bool uploaded = false;
  {
    const std::jthread reader([this, &stream] { ReadAll(stream.get()); });
    uploaded = Upload(stream.get());
  }
  const grpc::Status grpc_status = stream->Finish();

  AttemptOutcome outcome;
  outcome.reached_server = wrote_ || read_ || Answered(context_, grpc_status);
  outcome.result_started = collector_.started();
  outcome.elapsed = absl::Now() - start;
  if (!read_error_.ok()) {
    outcome.status = read_error_;
    outcome.local = true;
    return outcome;
  }
  if (!grpc_status.ok()) {
    outcome.status = FromGrpcStatus(grpc_status);
    return outcome;
  }
  outcome.local = true;
  if (!uploaded) {
    outcome.status = absl::InternalError(
        "the server's answer breaks the contract: the call ended well before everything was sent");
    return outcome;
  }
  absl::StatusOr<QuantizeResult> collected = std::move(collector_).Finish();
  outcome.status = collected.status();
  if (collected.ok()) *result = *std::move(collected);
  return outcome;
}

bool QuantizeCall::Upload(Stream* stream) {
  v1::QuantizeRequest frame;
  *frame.mutable_header() = MakeHeader(request_);
  if (!Send(stream, frame, 0)) return false;
  if (!UploadWeight(stream) || !UploadActivations(stream)) return false;
  // A server that has counted its rows may have answered in full by now, so what this returns
  // says nothing.
  stream->WritesDone();
  return true;
}

bool QuantizeCall::UploadWeight(Stream* stream) {
  const TensorView& weight = request_.weight;
  const int64_t rows = weight.shape[0];
  const int64_t step = std::max<int64_t>(1, chunk_bytes_ / RowBytes(weight));
  v1::QuantizeRequest frame;
  for (int64_t row = 0; row < rows; row += step) {
    const absl::string_view data = Rows(weight, row, std::min(step, rows - row));
    v1::TensorChunk* const chunk = frame.mutable_weight();
    chunk->set_row_offset(row);
    chunk->mutable_data()->assign(data.data(), data.size());
    if (!Send(stream, frame, data.size())) return false;
  }
  return true;
}

bool QuantizeCall::UploadActivations(Stream* stream) {
  if (!request_.x.has_value()) return true;
  const TensorView& x = *request_.x;
  const int64_t rows = x.shape[0];
  const int64_t row_bytes = RowBytes(request_.x) + RowBytes(request_.x_quantized);
  const int64_t step = std::max<int64_t>(1, chunk_bytes_ / row_bytes);
  v1::QuantizeRequest frame;
  for (int64_t row = 0; row < rows; row += step) {
    const int64_t count = std::min(step, rows - row);
    v1::ActivationChunk* const chunk = frame.mutable_activation();
    chunk->set_row_offset(row);
    const absl::string_view data = Rows(x, row, count);
    chunk->mutable_x()->assign(data.data(), data.size());
    size_t bytes = data.size();
    if (request_.x_quantized.has_value()) {
      const absl::string_view quantized = Rows(*request_.x_quantized, row, count);
      chunk->mutable_x_quantized()->assign(quantized.data(), quantized.size());
      bytes += quantized.size();
    }
    if (!Send(stream, frame, bytes)) return false;
  }
  return true;
}

bool QuantizeCall::Send(Stream* stream, const v1::QuantizeRequest& frame, size_t tensor_bytes) {
  if (reading_ended_.load(std::memory_order_relaxed) || !stream->Write(frame)) return false;
  wrote_ = true;
  sent_bytes_ += static_cast<int64_t>(tensor_bytes);
  Report(UploadProgress{.bytes = sent_bytes_, .total_bytes = total_bytes_});
  return true;
}

void QuantizeCall::ReadAll(Stream* stream) {
  v1::QuantizeResponse frame;
  while (stream->Read(&frame)) {
    read_ = true;
    if (!read_error_.ok()) continue;  // Cancelled: what is still under way is dropped.
    if (frame.has_progress()) {
      Report(frame.progress());
      continue;
    }
    read_error_ = collector_.Add(frame);
    if (!read_error_.ok()) context_.TryCancel();
  }
  reading_ended_.store(true, std::memory_order_relaxed);
}

void QuantizeCall::Report(const ProgressEvent& event) {
  if (!options_.progress) return;
  const std::lock_guard lock(progress_mutex_);
  options_.progress(event);
}

}  // namespace certiq
