// The part OPTQ and Qronos share: alphabet, sweep, and what it leaves behind.

#ifndef CERTIQ_ENGINE_SWEEP_METHOD_H_
#define CERTIQ_ENGINE_SWEEP_METHOD_H_

#include <vector>

#include "absl/status/statusor.h"
#include "engine/method.h"
#include "engine/rounding.h"

namespace certiq::engine {

// D with zeros for dead features.
std::vector<double> LiveD(const Factor& factor, const std::vector<bool>& dead);

// Computes the bits needed (B6) where a certificate is wanted, sweeps `targets`, and moves what the
// sweep found to the output (codes, rounding, clipping); `bound` is left as the sweep's sums.
// `change` is targets minus levels. `first_dynamic_group` as in SweepRules. `first_targets`, one a
// row, are what was aimed at in feature 0 where `targets` hold its levels already (Qronos); else
// empty.
absl::StatusOr<MethodOutput> Sweep(const MethodInput& input, const Factor& factor,
                                   int64_t first_dynamic_group,
                                   const std::vector<double>& first_targets, Grid& grid,
                                   StripMatrix targets, const RunContext& context);

}  // namespace certiq::engine

#endif  // CERTIQ_ENGINE_SWEEP_METHOD_H_
