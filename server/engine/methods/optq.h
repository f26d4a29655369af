// OPTQ / GPTQ (Frantar et al., arXiv 2210.17323) in the form of LDLQ (QuIP,
// arXiv 2307.13304).

#ifndef CERTIQ_ENGINE_METHODS_OPTQ_H_
#define CERTIQ_ENGINE_METHODS_OPTQ_H_

#include "absl/status/statusor.h"
#include "engine/methods/method.h"

namespace certiq::engine {

// Sweeps W (M2) with the feedback of H = X~^T X~ + lambda I = U D U^T. Matched
// inputs: what remains is, exactly, sum_j e_j^2 D_j (M3), bounded by (B1). Mismatched inputs: the
// error the layer starts with, |X w - X~ w|, is left alone and adds to the bound (B3). Fills
// `grid`'s dynamic groups. Fails only by cancellation.
absl::StatusOr<MethodOutput> Optq(const MethodInput& input, const Factor& factor, double lambda,
                                  Grid& grid, const RunContext& context);

}  // namespace certiq::engine

#endif  // CERTIQ_ENGINE_METHODS_OPTQ_H_
