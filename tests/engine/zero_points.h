// The codes of a grid, for tests that try every scale.

#ifndef CERTIQ_TESTS_ENGINE_ZERO_POINTS_H_
#define CERTIQ_TESTS_ENGINE_ZERO_POINTS_H_

#include <cstddef>
#include <numeric>
#include <vector>

#include "engine/spec.h"

namespace certiq::testing {

enum class ZeroPointRule { kSymmetric, kSigned, kAsymmetric };

inline engine::ResolvedSpec ZeroPointSpec(int bits, ZeroPointRule rule, engine::DType dtype) {
  engine::ResolvedSpec spec;
  spec.bits = bits;
  spec.symmetric = rule != ZeroPointRule::kAsymmetric;
  spec.signed_scales = rule == ZeroPointRule::kSigned;
  spec.scale_dtype = dtype;
  return spec;
}

// Every zero point that the spec allows.
inline std::vector<int> ZerosOf(const engine::ResolvedSpec& spec) {
  const int middle = 1 << (spec.bits - 1);
  if (spec.signed_scales) return {middle - 1, middle};
  if (spec.symmetric) return {middle};
  std::vector<int> zeros(size_t{1} << spec.bits);
  std::iota(zeros.begin(), zeros.end(), 0);
  return zeros;
}

}  // namespace certiq::testing

#endif  // CERTIQ_TESTS_ENGINE_ZERO_POINTS_H_
