// Largest eigenvalue of a Gram matrix: estimate and proven bound.

#ifndef CERTIQ_ENGINE_LINALG_SIGMA_MAX_H_
#define CERTIQ_ENGINE_LINALG_SIGMA_MAX_H_

#include "absl/status/statusor.h"
#include "engine/kernels/upper_triangle.h"
#include "engine/run_context.h"

namespace certiq::engine {

// sigma_max(X^T X), the largest eigenvalue of a symmetric positive
// semidefinite matrix of which the upper triangle is given, by Lanczos
// iteration with full reorthogonalisation from a fixed start. A lower bound; it stops when a
// step changes the Ritz value by less than 1e-12 of itself, or after
// 128 steps, when it is within 0.5 % except with probability below 1e-9 over starts (Kuczynski and
// Wozniakowski 1992, Thm 4.2). Costs 2 N^2 flops a step. Fails only by cancellation.
absl::StatusOr<double> LargestEigenvalue(const UpperTriangle<double>& s, const RunContext& context);

// A proven upper bound on the same: tau I - S has a Cholesky factorisation, so
// no eigenvalue passes tau. Within 1e-4 of the Lanczos value wherever that has converged;
// infinite where S is not finite. Costs N^3/3 flops. Fails only by cancellation.
absl::StatusOr<double> LargestEigenvalueBound(const UpperTriangle<double>& s,
                                              const RunContext& context);

}  // namespace certiq::engine

#endif  // CERTIQ_ENGINE_LINALG_SIGMA_MAX_H_
