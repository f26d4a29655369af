// Held-out error, and the search for the damping that makes it least (V1, V2).

#ifndef CERTIQ_ENGINE_DAMPING_DAMPING_SEARCH_H_
#define CERTIQ_ENGINE_DAMPING_DAMPING_SEARCH_H_

#include <cstdint>
#include <optional>

#include "absl/status/statusor.h"
#include "engine/certificate.h"
#include "engine/gram/layer.h"
#include "engine/methods/method.h"
#include "engine/run_context.h"
#include "engine/spec.h"

namespace certiq::engine {

// Held-out tokens, which no method has seen, in the working order of a layer.
struct HeldOutSet {
  SharedStatistics sums;
  // What W itself costs on them, where inputs are mismatched.
  std::optional<InitialError> initial;
  // |X W^T|^2 on them.
  double energy = 0;
};

// Brings sums into the layer's order. Errors as HeldOutError's.
absl::StatusOr<HeldOutSet> MakeHeldOutSet(SharedStatistics held_out, const WorkingLayer& layer,
                                          const RunContext& context);

// Relative error on them of a rounded layer with this `change` = W - Q. Fails by cancellation, and
// with FAILED_PRECONDITION where their sums are not those of any tokens (LiftToRounding).
absl::StatusOr<double> HeldOutError(const HeldOutSet& held, const WorkingLayer& layer,
                                    const StripMatrix& change, const RunContext& context);

// The same for plain rounding of W: to nearest, without feedback, with scales of (S1) or those
// given. Unset where such a scale does not fit its type. REQUIRES: W is still there.
absl::StatusOr<std::optional<double>> HeldOutNearestError(const HeldOutSet& held,
                                                          const WorkingLayer& layer,
                                                          const ResolvedSpec& spec,
                                                          const RunContext& context);

// (V2) lambda as a multiple of trace / N, by runs that are fitted without the held-out tokens and
// judged on them, on a sample of rows. First come plain sweeps for the spec's candidates: all of
// them, or with `damping_climb` from the middle on towards the smaller error until both neighbours
// of the best are worse; then the largest lambda whose error is within 2 % of it is preferred.
// Where the spec has scale trials or refinement, the best and the next more damped candidate are
// run with all of it: the better a fit, the more damping suits it. The last kind of run counts, by
// the same rule. Writes the candidates, their failures and flops, and the errors on held-out tokens
// to the certificate, that of plain rounding too. Errors are those of the last candidate that
// failed where all did, else as RunMethod.
absl::StatusOr<double> ChooseDamping(const LayerProblem& problem, const ResolvedSpec& spec,
                                     const RunContext& context, LayerCertificate& certificate);

}  // namespace certiq::engine

#endif  // CERTIQ_ENGINE_DAMPING_DAMPING_SEARCH_H_
