#include "engine/gram/held_out_split.h"

#include <algorithm>
#include <cmath>

#include "engine/kernels/random.h"

namespace certiq::engine {

HeldOutSplit::HeldOutSplit(double fraction, int64_t block_rows, absl::string_view stream_id)
    : fraction_(fraction), block_rows_(block_rows) {
  // FNV-1a, 64 bits.
  stream_hash_ = 0xcbf29ce484222325u;
  for (const char c : stream_id) {
    stream_hash_ = (stream_hash_ ^ static_cast<unsigned char>(c)) * 0x100000001b3u;
  }
}

bool HeldOutSplit::Gives(int64_t stratum, int64_t block) const {
  const uint64_t bits = Mix(stream_hash_ + static_cast<uint64_t>(stratum) * 0x9e3779b97f4a7c15u);
  const double u = static_cast<double>(bits >> 11) * 0x1p-53;
  return std::floor((static_cast<double>(stratum) + u) / fraction_) == static_cast<double>(block);
}

bool HeldOutSplit::IsHeldOut(int64_t row) const {
  if (fraction_ <= 0) return false;
  const int64_t block = row / block_rows_;
  // (s + u_s) / f lies in [block, block + 1) for at most these strata.
  const auto first = static_cast<int64_t>(std::floor(static_cast<double>(block) * fraction_));
  const auto last = static_cast<int64_t>(std::floor(static_cast<double>(block + 1) * fraction_));
  for (int64_t stratum = first; stratum <= last; ++stratum) {
    if (Gives(stratum, block)) return true;
  }
  return false;
}

int64_t HeldOutBlockRows(int64_t tokens, double fraction, int64_t sequence_rows) {
  if (sequence_rows > 0) return sequence_rows;
  // Blocks that a short stream gives up.
  constexpr double kBlocks = 8;
  const double rows = std::floor(static_cast<double>(tokens) * fraction / kBlocks);
  return std::clamp(static_cast<int64_t>(rows), int64_t{1}, HeldOutSplit::kBlockRows);
}

}  // namespace certiq::engine
