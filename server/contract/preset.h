// Quality presets: named bundles of settings.

#ifndef CERTIQ_CONTRACT_PRESET_H_
#define CERTIQ_CONTRACT_PRESET_H_

#include "certiq/v1/spec.pb.h"

namespace certiq::server {

// The spec with what its `quality` sets where nothing else is said; the spec itself without one.
// What a method, an explicit grid or stochastic rounding has no use for is left out.
v1::QuantizationSpec WithPreset(const v1::QuantizationSpec& given);

}  // namespace certiq::server

#endif  // CERTIQ_CONTRACT_PRESET_H_
