// Errors on tokens that no fit has seen, and damping chosen by them (V1, V2).

#ifndef CERTIQ_ENGINE_DAMPING_DAMPING_SEARCH_H_
#define CERTIQ_ENGINE_DAMPING_DAMPING_SEARCH_H_

#include <cstdint>
#include <optional>

#include "absl/status/statusor.h"
#include "engine/certificate.h"
#include "engine/methods/run_method.h"
#include "engine/quantize_layer.h"

namespace certiq::engine {

// Tokens that no part of a fit has seen, in the order of its features.
struct Unseen {
  SharedStatistics sums;
  // Of W on them, where inputs are mismatched.
  std::optional<InitialError> initial;
  // |X W^T|^2 on them.
  double energy = 0;
};

// Brings sums into the layer's order. Fails only by cancellation.
absl::StatusOr<Unseen> MakeUnseen(SharedStatistics held_out, const WorkingLayer& layer,
                                  const RunContext& context);

// Relative error of the fit on them. Fails only by cancellation.
absl::StatusOr<double> UnseenError(const Unseen& unseen, const WorkingLayer& layer, const Fit& fit,
                                   const RunContext& context);

// By the formulas' count: N^3 / 3 for each factorisation this fit made; R N^2 for a sweep of R
// rows, its trials and polish, 0 without a factor.
double FactorFlops(const Fit& fit, int64_t features);
double SweepFlops(const ResolvedSpec& spec, const Fit& fit, int64_t rows, int64_t features);

// (V2) lambda as a multiple of trace / N, by runs that are fitted without the held-out tokens and
// judged on them, on a sample of rows. First a plain sweep for the steps of the spec's ladder: all
// of them, or with `damping_climb` from the middle on towards the smaller error until both
// neighbours of the best are worse, and then the largest lambda whose error is within 2 % of it.
// Then, where the spec has scale trials or polish, the whole of it for the best and its neighbours:
// the better a fit, the more damping suits it. The last kind of run counts, by the same rule.
// Writes the ladder, its failures and flops, and the error on held-out tokens to the certificate.
// Errors of the last step that failed where all did, else as RunFit.
absl::StatusOr<double> ChooseDamping(const LayerProblem& problem, const ResolvedSpec& spec,
                                     const RunContext& context, LayerCertificate& certificate);

}  // namespace certiq::engine

#endif  // CERTIQ_ENGINE_DAMPING_DAMPING_SEARCH_H_
