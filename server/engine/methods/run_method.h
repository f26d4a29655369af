// One run of the spec's method with one lambda.

#ifndef CERTIQ_ENGINE_METHODS_RUN_METHOD_H_
#define CERTIQ_ENGINE_METHODS_RUN_METHOD_H_

#include <cstdint>

#include "absl/status/statusor.h"
#include "engine/certificate.h"
#include "engine/gram/layer.h"
#include "engine/methods/method.h"
#include "engine/run_context.h"
#include "engine/spec.h"

namespace certiq::engine {

// What a run is for.
struct RunUse {
  // Whether a certificate follows: without, the bits needed (B6) are left out.
  bool certified = true;
  // What is of no use afterwards, so that the run can make room: U, where the factor is its own,
  // and W and its initial error, which it takes from `layer` where its errors can be told without.
  bool consume_factor = false;
  bool consume_weights = false;
};

// Damps and factors, fills the grid, runs the spec's method. When every damping attempt failed:
// NEAREST where the spec says so, else FAILED_PRECONDITION of type "DAMPING" with the attempts,
// causes attached (failed_attempts.h). Seconds of the factor and round phases are added to
// `seconds`.
absl::StatusOr<RoundedLayer> RunMethod(const ResolvedSpec& spec, WorkingLayer& layer, double lambda,
                                       RunUse use, const RunContext& context,
                                       EngineSeconds& seconds);

// By the formulas' count: N^3 / 3 for each factorisation this run made; R N^2 for a sweep of R
// rows, its trials and refinement, 0 without a factor.
double FactorFlops(const RoundedLayer& rounded, int64_t features);
double SweepFlops(const ResolvedSpec& spec, const RoundedLayer& rounded, int64_t rows,
                  int64_t features);

}  // namespace certiq::engine

#endif  // CERTIQ_ENGINE_METHODS_RUN_METHOD_H_
