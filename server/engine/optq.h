// OPTQ / GPTQ (Frantar et al., arXiv 2210.17323) in the form of LDLQ (QuIP,
// arXiv 2307.13304).

#ifndef CERTIQ_ENGINE_OPTQ_H_
#define CERTIQ_ENGINE_OPTQ_H_

#include <vector>

#include "absl/status/statusor.h"
#include "engine/rounding.h"

namespace certiq::engine {

// Rounds W in place to W - Q. The target of column j is the weight plus the
// feedback of what was rounded before it (M2); the order is that of the
// features. What remains is, exactly, |X(w - q)|^2 + lambda |w - q|^2 = sum_j e_j^2 D_j for
// every row (M3). `dead` features must have zero weights. Fails only by cancellation.
absl::StatusOr<Rounded> Optq(const ResolvedSpec& spec, const Factor& factor,
                             const std::vector<bool>& dead, const Grid& grid, StripMatrix& weights,
                             const RunContext& context);

}  // namespace certiq::engine

#endif  // CERTIQ_ENGINE_OPTQ_H_
