// The part OPTQ and Qronos share: alphabet, sweep, and what it leaves behind.

#ifndef CERTIQ_ENGINE_METHODS_SWEEP_METHOD_H_
#define CERTIQ_ENGINE_METHODS_SWEEP_METHOD_H_

#include <vector>

#include "absl/status/statusor.h"
#include "engine/methods/feedback_sweep.h"
#include "engine/methods/method.h"

namespace certiq::engine {

// D with zeros for dead features.
std::vector<double> LiveD(const Factor& factor, const std::vector<bool>& dead);

// Sweeps W, taken from the input where that has it to spare, and moves what the sweep found to the
// output (codes, W - Q, rounding, clipping); `bound` is left as the sweep's sums. Computes the bits
// needed (B6) where a certificate is wanted. `first_dynamic_group` and `offsets` as in SweepRules;
// with offsets feature 0 has no part in the sums: Qronos' first error is in its initial term, and
// `first` says what it adds where trials are compared.
absl::StatusOr<MethodOutput> Sweep(const MethodInput& input, const Factor& factor,
                                   int64_t first_dynamic_group, const StripMatrix* offsets,
                                   const FirstError* first, Grid& grid, const RunContext& context);

}  // namespace certiq::engine

#endif  // CERTIQ_ENGINE_METHODS_SWEEP_METHOD_H_
