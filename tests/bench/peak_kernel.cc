// Compiled once an instruction set; see CMakeLists.txt.

#include "tests/bench/peak_kernel.h"

#include "engine/kernels/simd.h"

namespace certiq::bench::CERTIQ_PEAK_LEVEL {
namespace {

// Two units of latency 4 need 8 chains; 12 leave room.
constexpr int kChains = 12;

template <typename T>
double Run(int64_t steps) {
  engine::Vector<T> chain[kChains];
  for (int i = 0; i < kChains; ++i) chain[i] = engine::Vector<T>{} + static_cast<T>(i);
  // Contraction, so that values stay normal and nothing overflows. Volatile: not known before.
  volatile T factor_source = static_cast<T>(0.999);
  volatile T term_source = static_cast<T>(0.001);
  const engine::Vector<T> factor = engine::Vector<T>{} + factor_source;
  const engine::Vector<T> term = engine::Vector<T>{} + term_source;
  for (int64_t k = 0; k < steps; ++k) {
#pragma GCC unroll 12
    for (int i = 0; i < kChains; ++i) chain[i] = chain[i] * factor + term;
  }
  engine::Vector<T> sum = {};
  for (int i = 0; i < kChains; ++i) sum += chain[i];
  volatile T sink = sum[0];
  static_cast<void>(sink);
  return 2.0 * kChains * engine::kLanes<T> * static_cast<double>(steps);
}

}  // namespace

double MultiplyAddFloat(int64_t steps) { return Run<float>(steps); }
double MultiplyAddDouble(int64_t steps) { return Run<double>(steps); }

}  // namespace certiq::bench::CERTIQ_PEAK_LEVEL
