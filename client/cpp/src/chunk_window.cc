#include "chunk_window.h"

#include <algorithm>
#include <utility>

namespace certiq {
namespace {

int64_t BytesOf(const v1::AccumulateRequest& chunk) {
  return static_cast<int64_t>(chunk.chunk().x().size() + chunk.chunk().x_quantized().size());
}

}  // namespace

bool ChunkWindow::Append(int64_t rows, absl::string_view x, absl::string_view x_quantized) {
  v1::AccumulateChunk* const chunk = pending_.mutable_chunk();
  chunk->mutable_x()->append(x.data(), x.size());
  chunk->mutable_x_quantized()->append(x_quantized.data(), x_quantized.size());
  pending_rows_ += rows;
  if (pending_rows_ < chunk_rows_) return false;
  Flush();
  return true;
}

void ChunkWindow::Flush() {
  if (pending_rows_ == 0) return;
  pending_.mutable_chunk()->set_sequence(next_);
  ++next_;
  rows_ += std::exchange(pending_rows_, 0);
  bytes_ += BytesOf(pending_);
  kept_.push_back(std::exchange(pending_, {}));
}

void ChunkWindow::DropBefore(int64_t sequence) {
  while (!kept_.empty() && first() < sequence) {
    bytes_ -= BytesOf(kept_.front());
    kept_.pop_front();
  }
}

const v1::AccumulateRequest& ChunkWindow::chunk(int64_t sequence) const {
  return kept_[static_cast<size_t>(sequence - first())];
}

int64_t ChunkWindow::RowsBefore(int64_t sequence) const {
  return std::min(sequence * chunk_rows_, rows_);
}

}  // namespace certiq
