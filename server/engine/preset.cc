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
  if (*spec.quality == Quality::kFast) {
    if (sweeps && !spec.damping_rule.has_value()) {
      spec.damping_rule = DampingRule::kRelativeTrace;
      spec.damping_value = 0.1;
    }
    return spec;
  }
  if (sweeps && !spec.damping_rule.has_value()) {
    spec.damping_rule = DampingRule::kHeldOut;
    spec.damping_ladder = {0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.4, 0.8, 1.6};
    spec.damping_climb = true;
  }
  if (*spec.quality == Quality::kBalanced) return spec;
  if (sweeps && searches) Fill(spec.scale_trials, 9);
  if (nearest) Fill(spec.polish, 2);
  return spec;
}

}  // namespace certiq::engine
