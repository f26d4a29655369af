// The kernels of peak_kernel.cc, one namespace an instruction set.

#ifndef CERTIQ_TESTS_BENCH_PEAK_KERNEL_H_
#define CERTIQ_TESTS_BENCH_PEAK_KERNEL_H_

#include <cstdint>

namespace certiq::bench {
namespace v2 {
double MultiplyAddFloat(int64_t steps);
double MultiplyAddDouble(int64_t steps);
}  // namespace v2
namespace v3 {
double MultiplyAddFloat(int64_t steps);
double MultiplyAddDouble(int64_t steps);
}  // namespace v3
namespace v4 {
double MultiplyAddFloat(int64_t steps);
double MultiplyAddDouble(int64_t steps);
}  // namespace v4
}  // namespace certiq::bench

#endif  // CERTIQ_TESTS_BENCH_PEAK_KERNEL_H_
