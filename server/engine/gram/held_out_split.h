// Split of a token stream into fit and held-out rows (V1).

#ifndef CERTIQ_ENGINE_GRAM_HELD_OUT_SPLIT_H_
#define CERTIQ_ENGINE_GRAM_HELD_OUT_SPLIT_H_

#include <cstdint>

#include "absl/strings/string_view.h"

namespace certiq::engine {

// The split is by blocks of neighbouring rows, since neighbouring tokens
// resemble each other, and does not depend on how the rows are chunked: with f the share to hold
// out, stratum s = 0, 1, ... gives up block floor((s + u_s) / f), u_s in [0, 1) a hash of the
// stream's name and s. Every run of 1/f blocks so loses about one.
class HeldOutSplit {
 public:
  // Rows of a block where nothing else is known.
  static constexpr int64_t kBlockRows = 256;

  // Nothing is held out.
  HeldOutSplit() = default;
  // REQUIRES: 0 <= fraction <= 0.5, block_rows >= 1.
  HeldOutSplit(double fraction, int64_t block_rows, absl::string_view stream_id);

  bool IsHeldOut(int64_t row) const;
  // The first row after `row` that belongs to another block.
  int64_t BlockEnd(int64_t row) const { return (row / block_rows_ + 1) * block_rows_; }

  double fraction() const { return fraction_; }
  int64_t block_rows() const { return block_rows_; }

 private:
  bool Gives(int64_t stratum, int64_t block) const;

  double fraction_ = 0;
  int64_t block_rows_ = kBlockRows;
  uint64_t stream_hash_ = 0;
};

// Rows of a block for a stream of `tokens` rows: a sequence where the client
// marks them (sequence_rows > 0), else kBlockRows or, for a short stream,
// what lets eight blocks be held out: floor(tokens fraction / 8), at least 1. The error on one
// block of 128 rows of real layers was a quarter or less of that on other tokens, and chose a tenth
// of the best lambda; that on eight blocks of 16 came within a third.
int64_t HeldOutBlockRows(int64_t tokens, double fraction, int64_t sequence_rows);

}  // namespace certiq::engine

#endif  // CERTIQ_ENGINE_GRAM_HELD_OUT_SPLIT_H_
