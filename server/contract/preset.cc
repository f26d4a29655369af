#include "contract/preset.h"

#include <array>

namespace certiq::server {

v1::QuantizationSpec WithPreset(const v1::QuantizationSpec& given) {
  v1::QuantizationSpec spec = given;
  if (!spec.has_quality()) return spec;
  const bool sweeps = !spec.has_method() || spec.method() != v1::METHOD_NEAREST;
  const bool searches = !spec.has_grid();
  const bool nearest = !spec.has_rounding() || spec.rounding() == v1::ROUNDING_NEAREST;
  const bool symmetric = !spec.has_symmetric() || spec.symmetric();
  const bool damps = sweeps && spec.damping().rule_case() == v1::Damping::RULE_NOT_SET;
  if (!spec.has_order()) spec.set_order(v1::ORDER_DECREASING_NORM);
  if (searches && !spec.has_scale()) {
    spec.set_scale(sweeps ? v1::SCALE_RULE_COMPENSATED : v1::SCALE_RULE_PISO);
  }
  if (symmetric && searches && spec.scale() != v1::SCALE_RULE_ABSMAX && !spec.has_signed_scales()) {
    spec.set_signed_scales(true);
  }
  if (spec.quality() == v1::QUALITY_FAST) {
    if (damps) spec.mutable_damping()->set_relative_trace(0.1);
    return spec;
  }
  if (damps) {
    constexpr std::array kCandidates = {0.01, 0.03, 0.1, 0.3, 1.0};
    v1::HeldOutDamping* const held_out = spec.mutable_damping()->mutable_held_out();
    held_out->mutable_ladder()->Add(kCandidates.begin(), kCandidates.end());
    held_out->set_climb(true);
  }
  if (spec.quality() == v1::QUALITY_BALANCED) return spec;
  if (sweeps && searches && !spec.has_scale_trials()) spec.set_scale_trials(5);
  if (nearest && !spec.has_polish()) spec.set_polish(2);
  return spec;
}

}  // namespace certiq::server
