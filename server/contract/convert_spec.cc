// QuantizationSpec, both ways.

#include <cstdint>
#include <string>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "contract/convert.h"
#include "contract/enums.h"

namespace certiq::server {
namespace {

absl::Status ReadDamping(const v1::Damping& damping, engine::QuantizationSpec& out) {
  switch (damping.rule_case()) {
    case v1::Damping::kRelativeTrace:
      out.damping_rule = engine::DampingRule::kRelativeTrace;
      out.damping_value = damping.relative_trace();
      break;
    case v1::Damping::kAbsolute:
      out.damping_rule = engine::DampingRule::kAbsolute;
      out.damping_value = damping.absolute();
      break;
    case v1::Damping::kRelativeSigmaMax:
      out.damping_rule = engine::DampingRule::kRelativeSigmaMax;
      out.damping_value = damping.relative_sigma_max();
      break;
    case v1::Damping::kHeldOut:
      out.damping_rule = engine::DampingRule::kHeldOut;
      out.damping_ladder.assign(damping.held_out().ladder().begin(),
                                damping.held_out().ladder().end());
      if (damping.held_out().has_climb()) out.damping_climb = damping.held_out().climb();
      break;
    case v1::Damping::RULE_NOT_SET:
      break;
  }
  if (damping.has_max_attempts()) out.max_attempts = damping.max_attempts();
  if (damping.has_factor()) out.damping_factor = damping.factor();
  return ReadEnum(damping.has_on_failure(), damping.on_failure(), kOnFailures,
                  "spec.damping.on_failure", out.on_failure);
}

void ReadGrid(const v1::ExplicitGrid& grid, engine::QuantizationSpec& out) {
  engine::ExplicitGrid& to = out.grid.emplace();
  to.scales.assign(grid.scales().begin(), grid.scales().end());
  to.zero_points.assign(grid.zero_points().begin(), grid.zero_points().end());
  if (grid.has_lowest_code()) to.lowest_code = grid.lowest_code();
  if (grid.has_highest_code()) to.highest_code = grid.highest_code();
}

}  // namespace

absl::StatusOr<engine::QuantizationSpec> FromProto(const v1::QuantizationSpec& spec) {
  engine::QuantizationSpec out;
  absl::Status status = FirstError({
      ReadEnum(spec.has_method(), spec.method(), kMethods, "spec.method", out.method),
      ReadEnum(spec.has_scale_dtype(), spec.scale_dtype(), kDataTypes, "spec.scale_dtype",
               out.scale_dtype),
      ReadEnum(spec.has_group_scales(), spec.group_scales(), kGroupScales, "spec.group_scales",
               out.group_scales),
      ReadEnum(spec.has_scale(), spec.scale(), kScaleRules, "spec.scale", out.scale),
      ReadEnum(spec.has_scale_objective(), spec.scale_objective(), kScaleObjectives,
               "spec.scale_objective", out.scale_objective),
      ReadEnum(spec.has_rounding(), spec.rounding(), kRoundings, "spec.rounding", out.rounding),
      ReadEnum(spec.has_order(), spec.order(), kOrders, "spec.order", out.order),
      ReadEnum(spec.has_format(), spec.format(), kFormats, "spec.format", out.format),
      ReadEnum(spec.has_quality(), spec.quality(), kQualities, "spec.quality", out.quality),
      spec.has_damping() ? ReadDamping(spec.damping(), out) : absl::OkStatus(),
  });
  if (!status.ok()) return status;
  if (spec.has_bits()) out.bits = spec.bits();
  if (spec.has_symmetric()) out.symmetric = spec.symmetric();
  if (spec.has_group_size()) out.group_size = spec.group_size();
  if (spec.has_grid()) ReadGrid(spec.grid(), out);
  if (spec.has_scale_trials()) out.scale_trials = spec.scale_trials();
  if (spec.has_scale_passes()) out.scale_passes = spec.scale_passes();
  if (spec.has_signed_scales()) out.signed_scales = spec.signed_scales();
  if (spec.has_polish()) out.polish = spec.polish();
  if (spec.has_seed()) out.seed = spec.seed();
  if (spec.has_min_tokens()) out.min_tokens = spec.min_tokens();
  const v1::CertificateOptions& certificate = spec.certificate();
  if (certificate.has_per_row()) out.per_row = certificate.per_row();
  if (certificate.has_failure_probability()) {
    out.failure_probability = certificate.failure_probability();
  }
  if (certificate.has_compare_nearest()) out.compare_nearest = certificate.compare_nearest();
  return out;
}

// The settings as decided; an explicit grid stays out.
v1::QuantizationSpec ToProto(const engine::ResolvedSpec& from) {
  v1::QuantizationSpec to;
  to.set_method(ToWire(from.method, kMethods));
  to.set_bits(from.bits);
  to.set_symmetric(from.symmetric);
  to.set_group_size(static_cast<int32_t>(from.group_size));
  to.set_scale_dtype(ToWire(from.scale_dtype, kDataTypes));
  to.set_group_scales(ToWire(from.group_scales, kGroupScales));
  to.set_scale(ToWire(from.scale, kScaleRules));
  to.set_scale_trials(from.scale_trials);
  to.set_polish(from.polish);
  to.set_signed_scales(from.signed_scales);
  if (from.scale_objective.has_value()) {
    to.set_scale_objective(ToWire(*from.scale_objective, kScaleObjectives));
    to.set_scale_passes(from.scale_passes);
  }
  to.set_rounding(ToWire(from.rounding, kRoundings));
  to.set_seed(from.seed);
  to.set_min_tokens(from.min_tokens);
  to.set_order(ToWire(from.order, kOrders));
  to.set_format(ToWire(from.format, kFormats));
  if (from.quality.has_value()) to.set_quality(ToWire(*from.quality, kQualities));
  v1::Damping* const damping = to.mutable_damping();
  switch (from.damping_rule.value_or(engine::DampingRule::kRelativeTrace)) {
    case engine::DampingRule::kRelativeTrace:
      damping->set_relative_trace(from.damping_value);
      break;
    case engine::DampingRule::kAbsolute:
      damping->set_absolute(from.damping_value);
      break;
    case engine::DampingRule::kRelativeSigmaMax:
      damping->set_relative_sigma_max(from.damping_value);
      break;
    case engine::DampingRule::kHeldOut:
      damping->mutable_held_out()->mutable_ladder()->Add(from.damping_ladder.begin(),
                                                         from.damping_ladder.end());
      damping->mutable_held_out()->set_climb(from.damping_climb);
      break;
  }
  damping->set_max_attempts(from.max_attempts);
  damping->set_factor(from.damping_factor);
  damping->set_on_failure(ToWire(from.on_failure, kOnFailures));
  to.mutable_certificate()->set_per_row(from.per_row);
  to.mutable_certificate()->set_failure_probability(from.failure_probability);
  to.mutable_certificate()->set_compare_nearest(from.compare_nearest);
  return to;
}

}  // namespace certiq::server
