#include "contract/resolve_spec.h"

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <memory>
#include <vector>

#include "absl/strings/str_cat.h"
#include "absl/strings/string_view.h"
#include "base/status.h"
#include "base/status_macros.h"
#include "contract/enums.h"
#include "contract/preset.h"
#include "engine/linalg/damped_factor.h"

namespace certiq::server {
namespace {

// Each candidate is a run of its own.
constexpr size_t kMaxCandidates = 32;
constexpr int32_t kMaxPasses = 64;
// Each trial is a sweep of its own.
constexpr int32_t kMaxTrials = 32;
constexpr int32_t kMaxPolish = 64;

// A field with presence: what is absent keeps its default.
template <typename From, typename To>
void Set(bool has, From value, To& out) {
  if (has) out = value;
}

// The same for an enum; INVALID_ARGUMENT where the value is not in the table.
template <typename Wire, typename Ours, size_t N, typename To>
absl::Status SetEnum(bool has, Wire value, const EnumTable<Wire, Ours, N>& table,
                     absl::string_view field, To& out) {
  if (has) {
    ASSIGN_OR_RETURN(out, FromWire(value, table, field));
  }
  return absl::OkStatus();
}

absl::Status ReadEnums(const v1::QuantizationSpec& spec, engine::ResolvedSpec& out) {
  RETURN_IF_ERROR(SetEnum(spec.has_method(), spec.method(), kMethods, "spec.method", out.method));
  RETURN_IF_ERROR(SetEnum(spec.has_scale_dtype(), spec.scale_dtype(), kDataTypes,
                          "spec.scale_dtype", out.scale_dtype));
  RETURN_IF_ERROR(SetEnum(spec.has_group_scales(), spec.group_scales(), kGroupScales,
                          "spec.group_scales", out.group_scales));
  RETURN_IF_ERROR(SetEnum(spec.has_scale(), spec.scale(), kScaleRules, "spec.scale", out.scale));
  RETURN_IF_ERROR(SetEnum(spec.has_scale_objective(), spec.scale_objective(), kScaleObjectives,
                          "spec.scale_objective", out.scale_objective));
  RETURN_IF_ERROR(
      SetEnum(spec.has_rounding(), spec.rounding(), kRoundings, "spec.rounding", out.rounding));
  RETURN_IF_ERROR(SetEnum(spec.has_order(), spec.order(), kOrders, "spec.order", out.order));
  RETURN_IF_ERROR(SetEnum(spec.has_format(), spec.format(), kFormats, "spec.format", out.format));
  RETURN_IF_ERROR(
      SetEnum(spec.has_quality(), spec.quality(), kQualities, "spec.quality", out.quality));
  return SetEnum(spec.damping().has_on_failure(), spec.damping().on_failure(), kOnFailures,
                 "spec.damping.on_failure", out.on_failure);
}

engine::ExplicitGrid ReadGrid(const v1::ExplicitGrid& grid) {
  engine::ExplicitGrid to;
  to.scales.assign(grid.scales().begin(), grid.scales().end());
  to.zero_points.assign(grid.zero_points().begin(), grid.zero_points().end());
  if (grid.has_lowest_code()) to.lowest_code = grid.lowest_code();
  if (grid.has_highest_code()) to.highest_code = grid.highest_code();
  return to;
}

bool IsPacked(engine::Format format) {
  return format == engine::Format::kGptq || format == engine::Format::kGptqV2 ||
         format == engine::Format::kCompressedTensors;
}

absl::Status ResolveDamping(const v1::QuantizationSpec& spec, engine::ResolvedSpec& resolved) {
  const v1::Damping& damping = spec.damping();
  switch (damping.rule_case()) {
    case v1::Damping::kRelativeTrace:
      resolved.damping_rule = engine::DampingRule::kRelativeTrace;
      resolved.damping_value = damping.relative_trace();
      break;
    case v1::Damping::kAbsolute:
      resolved.damping_rule = engine::DampingRule::kAbsolute;
      resolved.damping_value = damping.absolute();
      break;
    case v1::Damping::kRelativeSigmaMax:
      resolved.damping_rule = engine::DampingRule::kRelativeSigmaMax;
      resolved.damping_value = damping.relative_sigma_max();
      break;
    case v1::Damping::kHeldOut:
      resolved.damping_rule = engine::DampingRule::kHeldOut;
      if (!damping.held_out().ladder().empty()) {
        resolved.damping_candidates.assign(damping.held_out().ladder().begin(),
                                           damping.held_out().ladder().end());
      }
      Set(damping.held_out().has_climb(), damping.held_out().climb(), resolved.damping_climb);
      break;
    case v1::Damping::RULE_NOT_SET:
      if (resolved.method == engine::Method::kQronos) resolved.damping_rule.reset();
      break;
  }
  if (!std::isfinite(resolved.damping_value) || resolved.damping_value < 0) {
    return base::InvalidField(
        engine::DampingField(resolved.damping_rule.value_or(engine::DampingRule::kRelativeTrace)),
        absl::StrCat("expected a finite number of at least 0, got ", resolved.damping_value));
  }
  const std::vector<double>& candidates = resolved.damping_candidates;
  if (candidates.size() > kMaxCandidates) {
    return base::InvalidField(
        "spec.damping.held_out.ladder",
        absl::StrCat("expected at most ", kMaxCandidates, " steps, got ", candidates.size()));
  }
  for (const double candidate : candidates) {
    if (std::isfinite(candidate) && candidate > 0) continue;
    return base::InvalidField("spec.damping.held_out.ladder",
                              absl::StrCat("expected finite numbers above 0, got ", candidate));
  }
  if (resolved.damping_climb && !std::is_sorted(candidates.begin(), candidates.end())) {
    return base::InvalidField("spec.damping.held_out.ladder",
                              "expected rising numbers, which can be climbed");
  }
  Set(damping.has_max_attempts(), damping.max_attempts(), resolved.max_attempts);
  if (resolved.max_attempts < 1 || resolved.max_attempts > 20) {
    return base::InvalidField("spec.damping.max_attempts",
                              absl::StrCat("expected 1 to 20, got ", resolved.max_attempts));
  }
  Set(damping.has_factor(), damping.factor(), resolved.damping_factor);
  if (!std::isfinite(resolved.damping_factor) || resolved.damping_factor <= 1) {
    return base::InvalidField(
        "spec.damping.factor",
        absl::StrCat("expected a finite number above 1, got ", resolved.damping_factor));
  }
  return absl::OkStatus();
}

// What only SCALE_RULE_PISO has.
absl::Status ResolvePiso(const v1::QuantizationSpec& spec, engine::ResolvedSpec& resolved) {
  if (resolved.scale != engine::ScaleRule::kPiso) {
    if (spec.has_scale_objective()) {
      return base::InvalidField("spec.scale_objective",
                                "expected SCALE_RULE_PISO with an objective");
    }
    if (spec.has_scale_passes()) {
      return base::InvalidField("spec.scale_passes", "expected SCALE_RULE_PISO with passes");
    }
    return absl::OkStatus();
  }
  const bool nearest = resolved.method == engine::Method::kNearest;
  if (!resolved.scale_objective.has_value()) {
    resolved.scale_objective =
        nearest ? engine::ScaleObjective::kMixed : engine::ScaleObjective::kQuantizedInputs;
  }
  resolved.scale_passes = nearest && resolved.group_size != 0 ? 3 : 0;
  Set(spec.has_scale_passes(), spec.scale_passes(), resolved.scale_passes);
  if (resolved.scale_passes < 0 || resolved.scale_passes > kMaxPasses) {
    return base::InvalidField("spec.scale_passes", absl::StrCat("expected 0 to ", kMaxPasses,
                                                                ", got ", resolved.scale_passes));
  }
  if (resolved.scale_passes == 0) return absl::OkStatus();
  if (resolved.group_size == 0) {
    return base::InvalidField(
        "spec.scale_passes",
        absl::StrCat("expected 0 without groups, where one search is exact, got ",
                     resolved.scale_passes));
  }
  if (resolved.scale_objective == engine::ScaleObjective::kDataFree) {
    return base::InvalidField(
        "spec.scale_passes",
        absl::StrCat("expected 0 with SCALE_OBJECTIVE_DATA_FREE, where groups do "
                     "not meet, got ",
                     resolved.scale_passes));
  }
  if (resolved.group_scales == engine::GroupScales::kDynamic && !nearest) {
    return base::InvalidField(
        "spec.scale_passes",
        absl::StrCat("expected 0 with GROUP_SCALES_DYNAMIC, whose groups the sweep "
                     "meets once, got ",
                     resolved.scale_passes));
  }
  return absl::OkStatus();
}

absl::Status ResolveSignedScales(const v1::QuantizationSpec& spec, engine::ResolvedSpec& resolved) {
  Set(spec.has_signed_scales(), spec.signed_scales(), resolved.signed_scales);
  if (!resolved.signed_scales) return absl::OkStatus();
  if (!resolved.symmetric) {
    return base::InvalidField("spec.signed_scales",
                              "expected false with an asymmetric grid, whose zero points do more");
  }
  if (resolved.scale == engine::ScaleRule::kAbsmax || resolved.grid != nullptr) {
    return base::InvalidField("spec.signed_scales",
                              "expected false without a search for scales (SCALE_RULE_MSE, PISO or "
                              "COMPENSATED, no spec.grid)");
  }
  return absl::OkStatus();
}

absl::Status ResolveGrid(const v1::QuantizationSpec& spec, engine::ResolvedSpec& resolved) {
  if (!spec.has_scale_dtype()) {
    resolved.scale_dtype = IsPacked(resolved.format) ? engine::DType::kF16 : engine::DType::kF32;
  }
  if (resolved.scale_dtype != engine::DType::kF32 && resolved.scale_dtype != engine::DType::kF16 &&
      resolved.scale_dtype != engine::DType::kBF16) {
    return base::InvalidField("spec.scale_dtype", absl::StrCat("expected F32, F16 or BF16, got ",
                                                               engine::Name(resolved.scale_dtype)));
  }
  if (resolved.scale == engine::ScaleRule::kCompensated &&
      resolved.method == engine::Method::kNearest) {
    return base::InvalidField(
        "spec.scale",
        "SCALE_RULE_COMPENSATED suits error feedback, of which METHOD_NEAREST has "
        "none: expected another rule, such as SCALE_RULE_PISO");
  }
  RETURN_IF_ERROR(ResolvePiso(spec, resolved));
  if (!spec.has_grid()) return absl::OkStatus();

  const engine::ExplicitGrid grid = ReadGrid(spec.grid());
  if (resolved.group_scales == engine::GroupScales::kDynamic) {
    return base::InvalidField("spec.group_scales",
                              "expected GROUP_SCALES_STATIC with an explicit grid, got "
                              "GROUP_SCALES_DYNAMIC");
  }
  if (resolved.symmetric != grid.zero_points.empty()) {
    return base::InvalidField("spec.grid.zero_points",
                              resolved.symmetric
                                  ? "expected none for a symmetric grid"
                                  : "expected one for each scale of an asymmetric grid");
  }
  const int32_t top = (1 << resolved.bits) - 1;
  const int32_t low = grid.lowest_code.value_or(0);
  const int32_t high = grid.highest_code.value_or(top);
  if (low < 0 || low >= high) {
    return base::InvalidField("spec.grid.lowest_code",
                              absl::StrCat("expected 0 to highest_code - 1, got ", low));
  }
  if (high > top) {
    return base::InvalidField("spec.grid.highest_code",
                              absl::StrCat("expected at most 2^bits - 1 = ", top, ", got ", high));
  }
  for (size_t i = 0; i < grid.scales.size(); ++i) {
    const float scale = grid.scales[i];
    if (std::isfinite(scale) && scale > 0 &&
        engine::RoundTo(resolved.scale_dtype, scale) == scale) {
      continue;
    }
    return base::InvalidField(
        "spec.grid.scales",
        absl::StrCat("expected positive finite values that scale_dtype ",
                     engine::Name(resolved.scale_dtype), " holds exactly, got ", scale, " at ", i));
  }
  // Every group can express 0, which dead features need (D3).
  const int32_t middle = 1 << (resolved.bits - 1);
  if (resolved.symmetric && (middle < low || middle > high)) {
    return base::InvalidField(
        "spec.grid.lowest_code",
        absl::StrCat("expected codes around the zero, ", middle, ", got ", low, " to ", high));
  }
  for (size_t i = 0; i < grid.zero_points.size(); ++i) {
    if (grid.zero_points[i] >= low && grid.zero_points[i] <= high) continue;
    return base::InvalidField(
        "spec.grid.zero_points",
        absl::StrCat("expected ", low, " to ", high, ", the codes in use, got ",
                     grid.zero_points[i], " at ", i));
  }
  resolved.grid = std::make_shared<const engine::ExplicitGrid>(grid);
  return absl::OkStatus();
}

// Scale trials and polish.
absl::Status ResolveSearch(const v1::QuantizationSpec& spec, engine::ResolvedSpec& resolved) {
  Set(spec.has_scale_trials(), spec.scale_trials(), resolved.scale_trials);
  if (resolved.scale_trials < 1 || resolved.scale_trials > kMaxTrials) {
    return base::InvalidField("spec.scale_trials", absl::StrCat("expected 1 to ", kMaxTrials,
                                                                ", got ", resolved.scale_trials));
  }
  if (resolved.scale_trials > 1 && resolved.method == engine::Method::kNearest) {
    return base::InvalidField(
        "spec.scale_trials",
        absl::StrCat("expected 1 with METHOD_NEAREST, which has no sweep to try scales with, got ",
                     resolved.scale_trials));
  }
  if (resolved.scale_trials > 1 && resolved.grid != nullptr) {
    return base::InvalidField(
        "spec.scale_trials",
        absl::StrCat("expected 1 with an explicit grid, whose scales are given, "
                     "got ",
                     resolved.scale_trials));
  }
  Set(spec.has_polish(), spec.polish(), resolved.polish);
  if (resolved.polish < 0 || resolved.polish > kMaxPolish) {
    return base::InvalidField(
        "spec.polish", absl::StrCat("expected 0 to ", kMaxPolish, ", got ", resolved.polish));
  }
  if (resolved.polish > 0 && resolved.rounding == engine::Rounding::kStochastic) {
    return base::InvalidField(
        "spec.polish",
        absl::StrCat("expected 0 with ROUNDING_STOCHASTIC: codes moved for a smaller error are no "
                     "longer unbiased, and the bound on single outputs (B5) is lost; got ",
                     resolved.polish));
  }
  return absl::OkStatus();
}

absl::Status CheckFormat(const engine::ResolvedSpec& spec) {
  const bool gptq = spec.format == engine::Format::kGptq || spec.format == engine::Format::kGptqV2;
  if (gptq && spec.scale_dtype != engine::DType::kF16) {
    return base::InvalidField("spec.scale_dtype",
                              absl::StrCat("expected F16, the type GPTQ checkpoints "
                                           "store scales in, got ",
                                           engine::Name(spec.scale_dtype)));
  }
  if (spec.format == engine::Format::kGptq && !spec.symmetric) {
    return base::InvalidField(
        "spec.format",
        "FORMAT_GPTQ stores the zero point minus one, which cannot express a zero "
        "point of 0: expected FORMAT_GPTQ_V2 for an asymmetric grid");
  }
  const bool reordered = spec.group_size != 0 && spec.order != engine::Order::kNatural &&
                         spec.group_scales == engine::GroupScales::kDynamic;
  if (spec.format == engine::Format::kCompressedTensors && reordered) {
    return base::InvalidField(
        "spec.group_scales",
        "expected GROUP_SCALES_STATIC for groups of FORMAT_COMPRESSED_TENSORS in "
        "ORDER_DECREASING_NORM, got GROUP_SCALES_DYNAMIC: its readers know groups of neighbouring "
        "columns only, without weight_g_idx. Use static scales, ORDER_NATURAL, or FORMAT_GPTQ_V2");
  }
  return absl::OkStatus();
}

}  // namespace

absl::StatusOr<engine::ResolvedSpec> ResolveSpec(const v1::QuantizationSpec& given) {
  const v1::QuantizationSpec spec = WithPreset(given);
  engine::ResolvedSpec resolved;
  RETURN_IF_ERROR(ReadEnums(spec, resolved));

  Set(spec.has_bits(), spec.bits(), resolved.bits);
  if (resolved.bits < 2 || resolved.bits > 8) {
    return base::InvalidField("spec.bits", absl::StrCat("expected 2 to 8, got ", resolved.bits));
  }
  Set(spec.has_symmetric(), spec.symmetric(), resolved.symmetric);
  Set(spec.has_group_size(), spec.group_size(), resolved.group_size);
  if (resolved.group_size != 0 && resolved.group_size < 8) {
    return base::InvalidField(
        "spec.group_size",
        absl::StrCat("expected 0 (one scale an output channel) or at least 8, got ",
                     resolved.group_size));
  }
  RETURN_IF_ERROR(ResolveGrid(spec, resolved));
  RETURN_IF_ERROR(CheckFormat(resolved));
  RETURN_IF_ERROR(ResolveSignedScales(spec, resolved));
  RETURN_IF_ERROR(ResolveSearch(spec, resolved));
  RETURN_IF_ERROR(ResolveDamping(spec, resolved));

  Set(spec.has_seed(), spec.seed(), resolved.seed);
  const v1::CertificateOptions& certificate = spec.certificate();
  Set(certificate.has_per_row(), certificate.per_row(), resolved.per_row);
  Set(certificate.has_failure_probability(), certificate.failure_probability(),
      resolved.failure_probability);
  if (!(resolved.failure_probability > 0 && resolved.failure_probability < 1)) {
    return base::InvalidField(
        "spec.certificate.failure_probability",
        absl::StrCat("expected a number in (0, 1), got ", resolved.failure_probability));
  }
  Set(certificate.has_compare_nearest(), certificate.compare_nearest(), resolved.compare_nearest);
  Set(spec.has_min_tokens(), spec.min_tokens(), resolved.min_tokens);
  if (resolved.min_tokens < 1) {
    return base::InvalidField("spec.min_tokens",
                              absl::StrCat("expected at least 1, got ", resolved.min_tokens));
  }
  return resolved;
}

absl::Status CheckSpecForLayer(const engine::ResolvedSpec& spec, int64_t rows, int64_t features) {
  const int64_t scales = rows * spec.Groups(features);
  if (spec.grid != nullptr && static_cast<int64_t>(spec.grid->scales.size()) != scales) {
    return base::InvalidField(
        "spec.grid.scales",
        absl::StrCat("expected ", rows, " rows x ", spec.Groups(features), " groups = ", scales,
                     " values, got ", spec.grid->scales.size()));
  }
  if (spec.grid != nullptr && !spec.symmetric &&
      static_cast<int64_t>(spec.grid->zero_points.size()) != scales) {
    return base::InvalidField(
        "spec.grid.zero_points",
        absl::StrCat("expected ", rows, " rows x ", spec.Groups(features), " groups = ", scales,
                     " values, got ", spec.grid->zero_points.size()));
  }
  if (spec.format == engine::Format::kGptq || spec.format == engine::Format::kGptqV2) {
    if (features * spec.bits % 32 != 0) {
      return base::InvalidField(
          "spec.format", absl::StrCat("GPTQ packs features into whole 32-bit words: expected "
                                      "features x bits divisible by 32, got ",
                                      features, " x ", spec.bits));
    }
    if (rows * spec.bits % 32 != 0) {
      return base::InvalidField(
          "spec.format", absl::StrCat("GPTQ packs zero points into whole 32-bit words: expected "
                                      "rows x bits divisible by 32, got ",
                                      rows, " x ", spec.bits));
    }
  }
  if (IsPacked(spec.format) && spec.group_size != 0 && features % spec.group_size != 0) {
    return base::InvalidField("spec.group_size",
                              absl::StrCat("expected a divisor of the ", features,
                                           " features for a packed format, got ", spec.group_size));
  }
  return absl::OkStatus();
}

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
      damping->mutable_held_out()->mutable_ladder()->Add(from.damping_candidates.begin(),
                                                         from.damping_candidates.end());
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
