#include "engine/preset.h"

#include <optional>
#include <vector>

namespace certiq::engine {
namespace {

template <typename T, typename U>
void Fill(std::optional<T>& field, const U& value) {
  if (!field.has_value()) field = value;
}

}  // namespace

QuantizationSpec WithPreset(const QuantizationSpec& given) {
  QuantizationSpec spec = given;
  if (!spec.quality.has_value()) return spec;
  const bool sweeps = spec.method.value_or(Method::kOptq) != Method::kNearest;
  const bool searches = !spec.grid.has_value();
  const bool nearest = spec.rounding.value_or(Rounding::kNearest) == Rounding::kNearest;
  Fill(spec.order, Order::kDecreasingNorm);
  if (searches) Fill(spec.scale, sweeps ? ScaleRule::kCompensated : ScaleRule::kPiso);
  const bool signs = spec.symmetric.value_or(true) && searches && spec.scale != ScaleRule::kAbsmax;
  if (signs) Fill(spec.signed_scales, true);
  if (*spec.quality == Quality::kFast) {
    if (sweeps && !spec.damping_rule.has_value()) {
      spec.damping_rule = DampingRule::kRelativeTrace;
      spec.damping_value = 0.1;
    }
    return spec;
  }
  if (sweeps && !spec.damping_rule.has_value()) {
    spec.damping_rule = DampingRule::kHeldOut;
    spec.damping_ladder = {0.01, 0.03, 0.1, 0.3, 1};
    spec.damping_climb = true;
  }
  if (*spec.quality == Quality::kBalanced) return spec;
  if (sweeps && searches) Fill(spec.scale_trials, 5);
  if (nearest) Fill(spec.polish, 2);
  return spec;
}

}  // namespace certiq::engine
