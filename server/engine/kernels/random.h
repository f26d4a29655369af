// Counter-based random numbers: a value depends on its key alone, so results
// depend neither on threads nor on the order of work.

#ifndef CERTIQ_ENGINE_KERNELS_RANDOM_H_
#define CERTIQ_ENGINE_KERNELS_RANDOM_H_

#include <cstdint>

namespace certiq::engine {

// The finaliser of SplitMix64 (Steele, Lea, Flood 2014): a bijection that
// mixes every input bit into every output bit.
inline uint64_t Mix(uint64_t x) {
  x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9u;
  x = (x ^ (x >> 27)) * 0x94d049bb133111ebu;
  return x ^ (x >> 31);
}

// Uniform on [0, 1) with 24 bits, keyed by seed, row and column.
inline float UniformAt(uint64_t seed, int64_t row, int64_t column) {
  const uint64_t keyed = Mix(seed + 0x9e3779b97f4a7c15u * (static_cast<uint64_t>(row) + 1));
  const uint64_t bits = Mix(keyed + 0xd1b54a32d192ed03u * (static_cast<uint64_t>(column) + 1));
  return static_cast<float>(bits >> 40) * 0x1p-24f;
}

}  // namespace certiq::engine

#endif  // CERTIQ_ENGINE_KERNELS_RANDOM_H_
