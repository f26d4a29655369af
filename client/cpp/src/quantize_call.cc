#include "quantize_call.h"

#include <algorithm>
#include <memory>
#include <thread>
#include <utility>

#include "request_check.h"
#include "rows.h"

namespace certiq {

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
  CallContext context(deadline, options_.cancel);
  const std::unique_ptr<Stream> stream = stub_->Quantize(context.get());
  bool uploaded = false;
  {
    const std::jthread reader([this, &stream, &context] { ReadAll(stream.get(), &context); });
    uploaded = Upload(stream.get());
  }
  const grpc::Status grpc_status = stream->Finish();

  AttemptOutcome outcome = context.Outcome(grpc_status, wrote_ || read_);
  outcome.result_started = collector_.started();
  if (!read_error_.ok()) {
    outcome.status = read_error_;
    outcome.local = true;
    return outcome;
  }
  if (!grpc_status.ok()) return outcome;
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
  return SendWeight<v1::QuantizeRequest>(
      request_.weight, chunk_bytes_,
      [&](const v1::QuantizeRequest& frame, size_t bytes) { return Send(stream, frame, bytes); });
}

bool QuantizeCall::UploadActivations(Stream* stream) {
  if (!request_.x.has_value()) return true;
  const TensorView& x = *request_.x;
  const int64_t rows = x.shape[0];
  const int64_t row_bytes =
      RowBytes(x) + (request_.x_quantized.has_value() ? RowBytes(*request_.x_quantized) : 0);
  const int64_t step = RowsInChunk(chunk_bytes_, row_bytes);
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

void QuantizeCall::ReadAll(Stream* stream, CallContext* context) {
  v1::QuantizeResponse frame;
  while (stream->Read(&frame)) {
    read_ = true;
    if (!read_error_.ok()) continue;  // Cancelled: what is still under way is dropped.
    if (frame.has_progress()) {
      Report(frame.progress());
      continue;
    }
    read_error_ = collector_.Add(frame);
    if (!read_error_.ok()) context->get()->TryCancel();
  }
  reading_ended_.store(true, std::memory_order_relaxed);
}

void QuantizeCall::Report(const ProgressEvent& event) {
  if (!options_.progress) return;
  const base::MutexLock lock(progress_mutex_);
  options_.progress(event);
}

}  // namespace certiq
