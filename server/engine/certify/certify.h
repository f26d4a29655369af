// From a fit to the numbers of the certificate.

#ifndef CERTIQ_ENGINE_CERTIFY_CERTIFY_H_
#define CERTIQ_ENGINE_CERTIFY_CERTIFY_H_

#include <cstdint>
#include <vector>

#include "absl/status/status.h"
#include "engine/certificate.h"
#include "engine/methods/run_method.h"

namespace certiq::engine {

// sqrt(squared_error / energy), 0 where both are 0.
double RelativeError(double squared_error, double energy);

double Sum(const std::vector<double>& values);

// At most `count` of `rows` rows, all of them where there are no more.
std::vector<int64_t> EvenlySpaced(int64_t count, int64_t rows);

// Fills errors, bounds, clipping, the factor's figures and predictions. `certificate`
// already has rows, features, tokens, spec and reference_energy. Fails only by cancellation.
absl::Status Certify(const ResolvedSpec& spec, const WorkingLayer& layer, const Fit& fit,
                     const RunContext& context, LayerCertificate& certificate);

}  // namespace certiq::engine

#endif  // CERTIQ_ENGINE_CERTIFY_CERTIFY_H_
