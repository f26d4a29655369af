#include "engine/spec.h"

#include <cmath>

#include "absl/strings/str_cat.h"
#include "absl/strings/string_view.h"
#include "engine/status.h"

namespace certiq::engine {
namespace {

absl::Status NotBuilt(absl::string_view field, absl::string_view value) {
  return FieldError(
      absl::StatusCode::kUnimplemented, field,
      absl::StrCat(value, " is part of the contract but this server does not offer it yet"));
}

absl::Status CheckOffered(const QuantizationSpec& spec) {
  if (spec.method.value_or(Method::kOptq) == Method::kNearest) {
    return NotBuilt("spec.method", "METHOD_NEAREST");
  }
  if (spec.method.value_or(Method::kOptq) == Method::kQronos) {
    return NotBuilt("spec.method", "METHOD_QRONOS");
  }
  if (spec.grid.has_value()) return NotBuilt("spec.grid", "an explicit grid");
  if (spec.group_scales.value_or(GroupScales::kStatic) != GroupScales::kStatic) {
    return NotBuilt("spec.group_scales", "GROUP_SCALES_DYNAMIC");
  }
  if (spec.scale.value_or(ScaleRule::kAbsmax) != ScaleRule::kAbsmax) {
    return NotBuilt("spec.scale", "a scale rule other than SCALE_RULE_ABSMAX");
  }
  if (spec.scale_trials.has_value()) return NotBuilt("spec.scale_trials", "a scale trial");
  if (spec.polish.value_or(0) != 0) return NotBuilt("spec.polish", "polish above 0");
  if (spec.rounding.value_or(Rounding::kNearest) != Rounding::kNearest) {
    return NotBuilt("spec.rounding", "ROUNDING_STOCHASTIC");
  }
  if (spec.order.value_or(Order::kNatural) != Order::kNatural) {
    return NotBuilt("spec.order", "ORDER_DECREASING_NORM");
  }
  if (spec.damping_rule == DampingRule::kRelativeSigmaMax) {
    return NotBuilt("spec.damping.relative_sigma_max", "relative_sigma_max");
  }
  if (spec.damping_rule == DampingRule::kHeldOut) {
    return NotBuilt("spec.damping.held_out", "held_out");
  }
  if (spec.format.value_or(Format::kDenseF32) != Format::kDenseF32) {
    return NotBuilt("spec.format", "a format other than FORMAT_DENSE_F32");
  }
  if (spec.quality.has_value()) return NotBuilt("spec.quality", "a quality preset");
  return absl::OkStatus();
}

}  // namespace

absl::StatusOr<ResolvedSpec> ResolveSpec(const QuantizationSpec& spec) {
  ResolvedSpec resolved;

  resolved.bits = spec.bits.value_or(4);
  if (resolved.bits < 2 || resolved.bits > 8) {
    return InvalidField("spec.bits", absl::StrCat("expected 2 to 8, got ", resolved.bits));
  }
  resolved.symmetric = spec.symmetric.value_or(true);
  resolved.group_size = spec.group_size.value_or(0);
  if (resolved.group_size != 0 && resolved.group_size < 8) {
    return InvalidField("spec.group_size",
                        absl::StrCat("expected 0 (one scale an output channel) or at least 8, got ",
                                     resolved.group_size));
  }
  resolved.scale_dtype = spec.scale_dtype.value_or(DType::kF32);
  if (resolved.scale_dtype != DType::kF32 && resolved.scale_dtype != DType::kF16 &&
      resolved.scale_dtype != DType::kBF16) {
    return InvalidField("spec.scale_dtype", absl::StrCat("expected F32, F16 or BF16, got ",
                                                         Name(resolved.scale_dtype)));
  }

  resolved.damping_rule = spec.damping_rule.value_or(DampingRule::kRelativeTrace);
  resolved.damping_value = spec.damping_value.value_or(0.01);
  if (!std::isfinite(resolved.damping_value) || resolved.damping_value < 0) {
    const char* field = resolved.damping_rule == DampingRule::kAbsolute
                            ? "spec.damping.absolute"
                            : "spec.damping.relative_trace";
    return InvalidField(field, absl::StrCat("expected a finite number of at least 0, got ",
                                            resolved.damping_value));
  }
  resolved.max_attempts = spec.max_attempts.value_or(5);
  if (resolved.max_attempts < 1 || resolved.max_attempts > 20) {
    return InvalidField("spec.damping.max_attempts",
                        absl::StrCat("expected 1 to 20, got ", resolved.max_attempts));
  }
  resolved.damping_factor = spec.damping_factor.value_or(10);
  if (!std::isfinite(resolved.damping_factor) || resolved.damping_factor <= 1) {
    return InvalidField(
        "spec.damping.factor",
        absl::StrCat("expected a finite number above 1, got ", resolved.damping_factor));
  }
  resolved.on_failure = spec.on_failure.value_or(OnFailure::kFail);

  resolved.seed = spec.seed.value_or(0);
  resolved.per_row = spec.per_row.value_or(true);
  const double epsilon = spec.failure_probability.value_or(1e-3);
  if (!(epsilon > 0 && epsilon < 1)) {
    return InvalidField("spec.certificate.failure_probability",
                        absl::StrCat("expected a number in (0, 1), got ", epsilon));
  }
  resolved.compare_nearest = spec.compare_nearest.value_or(false);

  if (absl::Status offered = CheckOffered(spec); !offered.ok()) return offered;
  return resolved;
}

}  // namespace certiq::engine
