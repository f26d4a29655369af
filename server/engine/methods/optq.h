// OPTQ / GPTQ (Frantar et al., arXiv 2210.17323) in the form of LDLQ (QuIP, arXiv 2307.13304).

#ifndef CERTIQ_ENGINE_METHODS_OPTQ_H_
#define CERTIQ_ENGINE_METHODS_OPTQ_H_

#include <cstdint>

#include "absl/status/status.h"
#include "engine/kernels/strip_matrix.h"
#include "engine/methods/feedback_sweep.h"
#include "engine/methods/method.h"
#include "engine/run_context.h"

namespace certiq::engine {

// Sweeps W (M2) with the feedback of H = X~^T X~ + lambda I = U D U^T. Matched
// inputs: what remains is, exactly, sum_j e_j^2 D_j (M3), bounded by (B1). Mismatched inputs: the
// error the layer starts with, |X w - X~ w|, is left alone and adds to the bound (B3). Fills
// result.grid's dynamic groups. REQUIRES: result.damping has a factor. Fails by cancellation, and
// with INVALID_ARGUMENT where a scale does not fit its type.
absl::Status Optq(const MethodInput& input, RoundedLayer& result, const RunContext& context);

// The sweep that OPTQ and Qronos share. Takes W from the layer where the input has it to spare, and
// fills the result's codes, change, rounding and clipping; `bound` is left as the sweep's sums.
// Computes the bits needed (B6) where a certificate is wanted. `first_dynamic_group` and `offsets`
// as in SweepRules; with offsets feature 0 has no part in the sums: Qronos' first error is in its
// initial term, and `first` says what it adds where trials are compared.
absl::Status RoundWithFeedback(const MethodInput& input, int64_t first_dynamic_group,
                               const StripMatrix* offsets, const FirstError* first,
                               RoundedLayer& result, const RunContext& context);

}  // namespace certiq::engine

#endif  // CERTIQ_ENGINE_METHODS_OPTQ_H_
