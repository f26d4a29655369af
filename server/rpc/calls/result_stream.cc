#include "rpc/calls/result_stream.h"

#include <algorithm>
#include <utility>

namespace certiq::server {
namespace {

CallFacts WithQueueSeconds(CallFacts facts, double seconds) {
  facts.queue_seconds = seconds;
  return facts;
}

}  // namespace

ResultStream::ResultStream(QuantizeResult result, CallFacts facts, int64_t frame_bytes)
    : reservation_(std::move(result.reservation)),
      frame_bytes_(frame_bytes),
      tensors_(std::move(result.layer.tensors)),
      certificates_(ToProto(result.layer.certificate,
                            WithQueueSeconds(std::move(facts), result.queue_seconds))) {}

bool ResultStream::Next(v1::QuantizeResponse& frame) {
  frame.Clear();
  if (!header_sent_) {
    header_sent_ = true;
    *frame.mutable_result() = ToProto(tensors_);
    return true;
  }
  while (tensor_ < tensors_.size()) {
    engine::ResultTensor& tensor = tensors_[tensor_];
    const int64_t rows = tensor.shape.empty() ? 1 : tensor.shape.front();
    if (row_ >= rows) {
      tensor.bytes = {};
      row_ = 0;
      ++tensor_;
      continue;
    }
    const int64_t row_bytes = static_cast<int64_t>(tensor.bytes.size()) / rows;
    const int64_t count =
        std::min(rows - row_, std::max<int64_t>(1, frame_bytes_ / std::max<int64_t>(row_bytes, 1)));
    v1::ResultChunk* const chunk = frame.mutable_chunk();
    chunk->set_tensor(static_cast<int32_t>(tensor_));
    chunk->set_row_offset(row_);
    chunk->set_data(tensor.bytes.data() + row_ * row_bytes, static_cast<size_t>(count * row_bytes));
    row_ += count;
    return true;
  }
  if (certificate_ < certificates_.size()) {
    *frame.mutable_certificate() = std::move(certificates_[certificate_++]);
    return true;
  }
  return false;
}

}  // namespace certiq::server
