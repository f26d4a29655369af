// Row slices of matrices, and messages of whole rows.
#ifndef CERTIQ_CLIENT_CPP_SRC_ROWS_H_
#define CERTIQ_CLIENT_CPP_SRC_ROWS_H_

#include <algorithm>
#include <cstdint>

#include "absl/strings/string_view.h"
#include "certiq/tensor.h"

namespace certiq {

// REQUIRES for all: a matrix [rows, columns] whose data has the size of its shape.

inline int64_t RowBytes(const TensorView& matrix) {
  return static_cast<int64_t>(matrix.data.size()) / matrix.shape[0];
}

// `count` rows from `first` on.
inline absl::string_view Rows(const TensorView& matrix, int64_t first, int64_t count) {
  const auto row_bytes = static_cast<size_t>(RowBytes(matrix));
  return matrix.data.substr(static_cast<size_t>(first) * row_bytes,
                            static_cast<size_t>(count) * row_bytes);
}

// Rows that fit into chunk_bytes; at least one.
inline int64_t RowsInChunk(int64_t chunk_bytes, int64_t row_bytes) {
  return std::max<int64_t>(1, chunk_bytes / row_bytes);
}

// Calls send(frame, bytes) with one frame after the other, each with chunks of whole rows in
// frame->mutable_weight(), until it returns false. Returns whether everything was sent.
template <typename Frame, typename Send>
bool SendWeight(const TensorView& weight, int64_t chunk_bytes, const Send& send) {
  const int64_t rows = weight.shape[0];
  const int64_t step = RowsInChunk(chunk_bytes, RowBytes(weight));
  Frame frame;
  for (int64_t row = 0; row < rows; row += step) {
    const absl::string_view data = Rows(weight, row, std::min(step, rows - row));
    auto* const chunk = frame.mutable_weight();
    chunk->set_row_offset(row);
    chunk->mutable_data()->assign(data.data(), data.size());
    if (!send(frame, data.size())) return false;
  }
  return true;
}

}  // namespace certiq

#endif  // CERTIQ_CLIENT_CPP_SRC_ROWS_H_
