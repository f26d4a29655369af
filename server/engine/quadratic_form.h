// x^T S x for many rows x at once: errors from statistics, without tokens.

#ifndef CERTIQ_ENGINE_QUADRATIC_FORM_H_
#define CERTIQ_ENGINE_QUADRATIC_FORM_H_

#include <cstdint>
#include <vector>

#include "absl/status/statusor.h"
#include "engine/run_context.h"
#include "engine/strip_matrix.h"
#include "engine/upper_panels.h"

namespace certiq::engine {

// x_r^T S x_r for every row of `rows`; S symmetric, upper triangle given.
// With S = X^T X this is |X x_r|^2. Products are float32, sums over features
// float64: relative to sum_ij |x_i S_ij x_j| the error is of the order of
// sqrt(N) 2^-24. S is scaled by a power of two so that float32 holds it. Costs R N^2
// flops (one triangle). Fails only by cancellation.
absl::StatusOr<std::vector<double>> QuadraticForms(const UpperPanels<double>& s,
                                                   const StripMatrix& rows, Phase phase,
                                                   const RunContext& context);

// The same in float64 for chosen rows. Costs 2 |chosen| N^2 flops.
std::vector<double> ExactQuadraticForms(const UpperPanels<double>& s, const StripMatrix& rows,
                                        const std::vector<int64_t>& chosen,
                                        const RunContext& context);

}  // namespace certiq::engine

#endif  // CERTIQ_ENGINE_QUADRATIC_FORM_H_
