// The certificate's numbers, from a rounded layer.

#ifndef CERTIQ_ENGINE_CERTIFY_CERTIFY_H_
#define CERTIQ_ENGINE_CERTIFY_CERTIFY_H_

#include "absl/status/status.h"
#include "engine/certificate.h"
#include "engine/gram/layer.h"
#include "engine/methods/method.h"
#include "engine/run_context.h"
#include "engine/spec.h"

namespace certiq::engine {

// Fills errors, bounds, clipping, the factor's figures and predictions. `certificate`
// already has rows, features, tokens, spec and reference_energy. Fails by cancellation, and with
// FAILED_PRECONDITION ("SUMS") where the sums give a row an error below zero that rounding does not
// explain.
absl::Status Certify(const ResolvedSpec& spec, const WorkingLayer& layer,
                     const RoundedLayer& rounded, const RunContext& context,
                     LayerCertificate& certificate);

// INVALID_ARGUMENT where a number of a certificate is not finite: naming the damping where lambda
// is what left float64, else the weights.
absl::Status CheckFinite(const ResolvedSpec& spec, const LayerCertificate& certificate);

}  // namespace certiq::engine

#endif  // CERTIQ_ENGINE_CERTIFY_CERTIFY_H_
