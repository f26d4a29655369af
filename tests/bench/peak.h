// The peak of the machine: chains of fused multiply-adds that never leave the registers.

#ifndef CERTIQ_TESTS_BENCH_PEAK_H_
#define CERTIQ_TESTS_BENCH_PEAK_H_

#include <cstdint>

namespace certiq::bench {

// Runs `steps` multiply-adds on each of the chains that hide their latency, for the
// instruction set that the engine runs on. Returns the floating point operations done.
double MultiplyAddFloat(int64_t steps);
double MultiplyAddDouble(int64_t steps);

// Billions of floating point operations a second of `threads` threads of our own, the best of
// several runs; measured once and remembered.
double PeakFloat(int threads);
double PeakDouble(int threads);

}  // namespace certiq::bench

#endif  // CERTIQ_TESTS_BENCH_PEAK_H_
