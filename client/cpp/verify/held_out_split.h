// Held-out split of the rows of the activations (V1), by the rule of QuantizeHeader.
#ifndef CERTIQ_CLIENT_CPP_VERIFY_HELD_OUT_SPLIT_H_
#define CERTIQ_CLIENT_CPP_VERIFY_HELD_OUT_SPLIT_H_

#include <cstdint>
#include <vector>

#include "absl/strings/string_view.h"

namespace certiq::verify {

// One entry a row, true where it was held out. Rows are cut into blocks of `block_rows`; stratum
// s = 0, 1, ... gives up block floor((s + u_s) / fraction), where u_s is the upper 53 bits of
// SplitMix64's finaliser of FNV-1a64(stream_id) + s 0x9e3779b97f4a7c15, as a fraction of 2^53.
// Quantize calls have the empty stream_id.
// REQUIRES: rows >= 0, 0 <= fraction <= 0.5, block_rows >= 1.
std::vector<bool> HeldOutRows(int64_t rows, double fraction, int64_t block_rows,
                              absl::string_view stream_id);

}  // namespace certiq::verify

#endif  // CERTIQ_CLIENT_CPP_VERIFY_HELD_OUT_SPLIT_H_
