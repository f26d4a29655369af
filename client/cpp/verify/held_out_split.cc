#include "held_out_split.h"

#include <algorithm>
#include <cmath>

#include "absl/strings/string_view.h"

namespace certiq::verify {
namespace {

uint64_t Fnv1a(absl::string_view bytes) {
  uint64_t hash = 0xcbf29ce484222325u;
  for (const char c : bytes) hash = (hash ^ static_cast<unsigned char>(c)) * 0x100000001b3u;
  return hash;
}

// The finaliser of SplitMix64.
uint64_t Finalise(uint64_t z) {
  z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9u;
  z = (z ^ z >> 27) * 0x94d049bb133111ebu;
  return z ^ z >> 31;
}

}  // namespace

std::vector<bool> HeldOutRows(int64_t rows, double fraction, int64_t block_rows,
                              absl::string_view stream_id) {
  std::vector<bool> held(static_cast<size_t>(rows), false);
  if (fraction <= 0 || rows == 0) return held;
  const uint64_t stream = Fnv1a(stream_id);
  const int64_t whole_blocks = (rows - 1) / block_rows + 1;
  const auto blocks = static_cast<double>(whole_blocks);
  for (uint64_t s = 0; static_cast<double>(s) / fraction < blocks; ++s) {
    const uint64_t bits = Finalise(stream + s * 0x9e3779b97f4a7c15u) >> 11;
    const double u = std::ldexp(static_cast<double>(bits), -53);
    const double block = std::floor((static_cast<double>(s) + u) / fraction);
    if (block >= blocks) continue;
    const int64_t begin = static_cast<int64_t>(block) * block_rows;
    const int64_t end = std::min(rows, begin + block_rows);
    for (int64_t row = begin; row < end; ++row) held[static_cast<size_t>(row)] = true;
  }
  return held;
}

}  // namespace certiq::verify
