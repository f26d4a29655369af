// Window of the chunks that the server has not yet made durable.
#ifndef CERTIQ_CLIENT_CPP_SRC_CHUNK_WINDOW_H_
#define CERTIQ_CLIENT_CPP_SRC_CHUNK_WINDOW_H_

#include <cstdint>
#include <deque>
#include <memory>

#include "absl/strings/string_view.h"
#include "certiq/v1/calibration_service.pb.h"

namespace certiq {

// Chunk k holds rows [k chunk_rows, (k + 1) chunk_rows); the last one may hold fewer. Not
// thread-safe.
class ChunkWindow {
 public:
  // REQUIRES: chunk_rows >= 1.
  explicit ChunkWindow(int64_t chunk_rows) : chunk_rows_(chunk_rows) {}

  // Rows that the chunk in the making still takes; at least 1.
  int64_t room() const { return chunk_rows_ - pending_rows_; }

  // REQUIRES: 1 <= rows <= room(). Returns whether that completed a chunk.
  bool Append(int64_t rows, absl::string_view x, absl::string_view x_quantized);

  // Completes a chunk of the rows that are left, if any. Nothing may be appended after that.
  void Flush();

  // Forgets the chunks before `sequence`.
  void DropBefore(int64_t sequence);

  // REQUIRES: first() <= sequence < next().
  const v1::AccumulateRequest& chunk(int64_t sequence) const;

  // The oldest chunk that is kept, or next().
  int64_t first() const { return next_ - static_cast<int64_t>(kept_.size()); }
  // The number of chunks completed, which is the next one's sequence number.
  int64_t next() const { return next_; }
  // Rows in the chunks before `sequence`. REQUIRES: sequence <= next().
  int64_t RowsBefore(int64_t sequence) const;
  // Bytes of rows in the chunks that are kept.
  int64_t bytes() const { return bytes_; }

 private:
  const int64_t chunk_rows_;
  int64_t next_ = 0;
  // Rows in completed chunks.
  int64_t rows_ = 0;
  int64_t bytes_ = 0;
  int64_t pending_rows_ = 0;
  v1::AccumulateRequest pending_;
  std::deque<v1::AccumulateRequest> kept_;
};

}  // namespace certiq

#endif  // CERTIQ_CLIENT_CPP_SRC_CHUNK_WINDOW_H_
