// Named bundles of settings.

#ifndef CERTIQ_ENGINE_PRESET_H_
#define CERTIQ_ENGINE_PRESET_H_

#include "engine/spec.h"

namespace certiq::engine {

// The spec with what its `quality` sets where nothing else is said; the spec itself without one.
// What a method, an explicit grid or stochastic rounding has no use for is left out.
QuantizationSpec WithPreset(const QuantizationSpec& given);

}  // namespace certiq::engine

#endif  // CERTIQ_ENGINE_PRESET_H_
