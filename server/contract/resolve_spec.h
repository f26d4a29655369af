// QuantizationSpec of the contract to the engine's settings, and back.

#ifndef CERTIQ_CONTRACT_RESOLVE_SPEC_H_
#define CERTIQ_CONTRACT_RESOLVE_SPEC_H_

#include <cstdint>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "certiq/v1/spec.pb.h"
#include "engine/spec.h"

namespace certiq::server {

// Fills presets and defaults and checks every value. INVALID_ARGUMENT naming the field
// ("spec.bits"), what was expected and what came.
absl::StatusOr<engine::ResolvedSpec> ResolveSpec(const v1::QuantizationSpec& spec);

// Checks what depends on the layer's size: an explicit grid's counts, what a format demands.
// INVALID_ARGUMENT naming the field. The engine requires it of every layer.
absl::Status CheckSpecForLayer(const engine::ResolvedSpec& spec, int64_t rows, int64_t features);

// The settings as decided; an explicit grid stays out.
v1::QuantizationSpec ToProto(const engine::ResolvedSpec& spec);

}  // namespace certiq::server

#endif  // CERTIQ_CONTRACT_RESOLVE_SPEC_H_
