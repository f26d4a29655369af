// Settings of tests, completed as the contract completes them.

#ifndef CERTIQ_TESTS_ENGINE_SPECS_H_
#define CERTIQ_TESTS_ENGINE_SPECS_H_

#include "engine/spec.h"

namespace certiq::testing {

// The spec with the defaults that depend on other settings, where those are left at the engine's
// own: PiSO's objective and passes, and the scale type of packed formats.
inline engine::ResolvedSpec Completed(engine::ResolvedSpec spec) {
  const bool nearest = spec.method == engine::Method::kNearest;
  if (spec.scale == engine::ScaleRule::kPiso && !spec.scale_objective.has_value()) {
    spec.scale_objective =
        nearest ? engine::ScaleObjective::kMixed : engine::ScaleObjective::kQuantizedInputs;
    if (nearest && spec.group_size != 0 && spec.scale_passes == 0) spec.scale_passes = 3;
  }
  const bool packed = spec.format == engine::Format::kGptq ||
                      spec.format == engine::Format::kGptqV2 ||
                      spec.format == engine::Format::kCompressedTensors;
  if (packed && spec.scale_dtype == engine::DType::kF32) spec.scale_dtype = engine::DType::kF16;
  return spec;
}

}  // namespace certiq::testing

#endif  // CERTIQ_TESTS_ENGINE_SPECS_H_
