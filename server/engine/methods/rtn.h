// RTN, rounding to nearest without error feedback: a method, and the yardstick of the others.

#ifndef CERTIQ_ENGINE_METHODS_RTN_H_
#define CERTIQ_ENGINE_METHODS_RTN_H_

#include <cstdint>
#include <vector>

#include "absl/status/status.h"
#include "engine/gram/layer.h"
#include "engine/kernels/aligned.h"
#include "engine/methods/method.h"
#include "engine/run_context.h"
#include "engine/spec.h"

namespace certiq::engine {

// Every weight rounded by itself, by the spec's rounding rule, on result.grid. With eps_j =
// max(delta_j / 2, |e_j|) the bound is (B2), min(sum_j eps_j |X~_j|, sqrt(sum_j eps_j^2)
// sigma_max(X~)), plus |(X - X~) w| where inputs are mismatched. Dead features take no part in the
// sums. Fails by cancellation, and with INVALID_ARGUMENT where sums are not finite.
absl::Status Nearest(const MethodInput& input, RoundedLayer& result, const RunContext& context);

// Sums of a row for (B2): sum_j eps_j |X~_j| and, over live features, sum_j eps_j^2.
struct RowReach {
  double weighted = 0;
  double squares = 0;
};

// The rounding alone, or the codes that are given (row-major; null: none are): fills result.codes,
// change and clipping on result.grid, and returns the sums of each row. `feature_norms` are |X~_j|,
// 0 for dead features.
std::vector<RowReach> RoundAlone(const ResolvedSpec& spec, const WorkingLayer& layer,
                                 const std::vector<double>& feature_norms,
                                 const UnsetVector<uint8_t>* codes, const RunContext& context,
                                 RoundedLayer& result);

}  // namespace certiq::engine

#endif  // CERTIQ_ENGINE_METHODS_RTN_H_
