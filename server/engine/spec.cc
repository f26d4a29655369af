#include "engine/spec.h"

#include <algorithm>
#include <cmath>
#include <memory>

#include "absl/strings/str_cat.h"
#include "absl/strings/string_view.h"
#include "base/status.h"
#include "engine/preset.h"

namespace certiq::engine {
namespace {

// Each step of the ladder is a run of its own.
constexpr size_t kMaxLadder = 32;
constexpr int32_t kMaxPasses = 64;
// Each trial is a sweep of its own.
constexpr int32_t kMaxTrials = 32;
constexpr int32_t kMaxPolish = 64;

bool IsPacked(Format format) {
  return format == Format::kGptq || format == Format::kGptqV2 ||
         format == Format::kCompressedTensors;
}

// "spec.damping.<rule>".
const char* DampingField(DampingRule rule) {
  switch (rule) {
    case DampingRule::kRelativeTrace:
      return "spec.damping.relative_trace";
    case DampingRule::kAbsolute:
      return "spec.damping.absolute";
    case DampingRule::kRelativeSigmaMax:
      return "spec.damping.relative_sigma_max";
    case DampingRule::kHeldOut:
      return "spec.damping.held_out";
  }
  return "spec.damping";
}

absl::Status ResolveDamping(const QuantizationSpec& spec, ResolvedSpec& resolved) {
  resolved.damping_rule = spec.damping_rule;
  if (!spec.damping_rule.has_value() && resolved.method != Method::kQronos) {
    resolved.damping_rule = DampingRule::kRelativeTrace;
  }
  resolved.damping_value = spec.damping_value.value_or(0.01);
  if (!std::isfinite(resolved.damping_value) || resolved.damping_value < 0) {
    return base::InvalidField(
        DampingField(resolved.damping_rule.value_or(DampingRule::kRelativeTrace)),
        absl::StrCat("expected a finite number of at least 0, got ", resolved.damping_value));
  }
  resolved.damping_ladder = spec.damping_ladder;
  if (resolved.damping_ladder.empty()) {
    resolved.damping_ladder = {0.001, 0.01, 0.03, 0.1, 0.3, 1};
  }
  if (resolved.damping_ladder.size() > kMaxLadder) {
    return base::InvalidField("spec.damping.held_out.ladder",
                              absl::StrCat("expected at most ", kMaxLadder, " steps, got ",
                                           resolved.damping_ladder.size()));
  }
  for (const double step : resolved.damping_ladder) {
    if (std::isfinite(step) && step > 0) continue;
    return base::InvalidField("spec.damping.held_out.ladder",
                              absl::StrCat("expected finite numbers above 0, got ", step));
  }
  resolved.damping_climb = spec.damping_climb.value_or(false);
  const std::vector<double>& ladder = resolved.damping_ladder;
  if (resolved.damping_climb && !std::is_sorted(ladder.begin(), ladder.end())) {
    return base::InvalidField("spec.damping.held_out.ladder",
                              "expected rising numbers, which can be climbed");
  }
  resolved.max_attempts = spec.max_attempts.value_or(5);
  if (resolved.max_attempts < 1 || resolved.max_attempts > 20) {
    return base::InvalidField("spec.damping.max_attempts",
                              absl::StrCat("expected 1 to 20, got ", resolved.max_attempts));
  }
  resolved.damping_factor = spec.damping_factor.value_or(10);
  if (!std::isfinite(resolved.damping_factor) || resolved.damping_factor <= 1) {
    return base::InvalidField(
        "spec.damping.factor",
        absl::StrCat("expected a finite number above 1, got ", resolved.damping_factor));
  }
  resolved.on_failure = spec.on_failure.value_or(OnFailure::kFail);
  return absl::OkStatus();
}

// What only SCALE_RULE_PISO has.
absl::Status ResolvePiso(const QuantizationSpec& spec, ResolvedSpec& resolved) {
  if (resolved.scale != ScaleRule::kPiso) {
    if (spec.scale_objective.has_value()) {
      return base::InvalidField("spec.scale_objective",
                                "expected SCALE_RULE_PISO with an objective");
    }
    if (spec.scale_passes.has_value()) {
      return base::InvalidField("spec.scale_passes", "expected SCALE_RULE_PISO with passes");
    }
    return absl::OkStatus();
  }
  const bool nearest = resolved.method == Method::kNearest;
  resolved.scale_objective = spec.scale_objective.value_or(
      nearest ? ScaleObjective::kMixed : ScaleObjective::kQuantizedInputs);
  resolved.scale_passes = spec.scale_passes.value_or(nearest && resolved.group_size != 0 ? 3 : 0);
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
  if (resolved.scale_objective == ScaleObjective::kDataFree) {
    return base::InvalidField(
        "spec.scale_passes",
        absl::StrCat("expected 0 with SCALE_OBJECTIVE_DATA_FREE, where groups do "
                     "not meet, got ",
                     resolved.scale_passes));
  }
  if (resolved.group_scales == GroupScales::kDynamic && !nearest) {
    return base::InvalidField(
        "spec.scale_passes",
        absl::StrCat("expected 0 with GROUP_SCALES_DYNAMIC, whose groups the sweep "
                     "meets once, got ",
                     resolved.scale_passes));
  }
  return absl::OkStatus();
}

absl::Status ResolveSignedScales(const QuantizationSpec& spec, ResolvedSpec& resolved) {
  resolved.signed_scales = spec.signed_scales.value_or(false);
  if (!resolved.signed_scales) return absl::OkStatus();
  if (!resolved.symmetric) {
    return base::InvalidField("spec.signed_scales",
                              "expected false with an asymmetric grid, whose zero points do more");
  }
  if (resolved.scale == ScaleRule::kAbsmax || resolved.grid != nullptr) {
    return base::InvalidField("spec.signed_scales",
                              "expected false without a search for scales (SCALE_RULE_MSE, PISO or "
                              "COMPENSATED, no spec.grid)");
  }
  return absl::OkStatus();
}

absl::Status ResolveGrid(const QuantizationSpec& spec, ResolvedSpec& resolved) {
  resolved.format = spec.format.value_or(Format::kDenseF32);
  resolved.scale_dtype =
      spec.scale_dtype.value_or(IsPacked(resolved.format) ? DType::kF16 : DType::kF32);
  if (resolved.scale_dtype != DType::kF32 && resolved.scale_dtype != DType::kF16 &&
      resolved.scale_dtype != DType::kBF16) {
    return base::InvalidField("spec.scale_dtype", absl::StrCat("expected F32, F16 or BF16, got ",
                                                               Name(resolved.scale_dtype)));
  }
  resolved.group_scales = spec.group_scales.value_or(GroupScales::kStatic);
  resolved.scale = spec.scale.value_or(ScaleRule::kAbsmax);
  if (resolved.scale == ScaleRule::kCompensated && resolved.method == Method::kNearest) {
    return base::InvalidField(
        "spec.scale",
        "SCALE_RULE_COMPENSATED suits error feedback, of which METHOD_NEAREST has "
        "none: expected another rule, such as SCALE_RULE_PISO");
  }
  if (absl::Status status = ResolvePiso(spec, resolved); !status.ok()) return status;
  if (!spec.grid.has_value()) return absl::OkStatus();

  const ExplicitGrid& grid = *spec.grid;
  if (resolved.group_scales == GroupScales::kDynamic) {
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
    if (std::isfinite(scale) && scale > 0 && RoundTo(resolved.scale_dtype, scale) == scale) {
      continue;
    }
    return base::InvalidField(
        "spec.grid.scales",
        absl::StrCat("expected positive finite values that scale_dtype ",
                     Name(resolved.scale_dtype), " holds exactly, got ", scale, " at ", i));
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
  resolved.grid = std::make_shared<const ExplicitGrid>(grid);
  return absl::OkStatus();
}

// Scale trials and polish.
absl::Status ResolveSearch(const QuantizationSpec& spec, ResolvedSpec& resolved) {
  resolved.scale_trials = spec.scale_trials.value_or(1);
  if (resolved.scale_trials < 1 || resolved.scale_trials > kMaxTrials) {
    return base::InvalidField("spec.scale_trials", absl::StrCat("expected 1 to ", kMaxTrials,
                                                                ", got ", resolved.scale_trials));
  }
  if (resolved.scale_trials > 1 && resolved.method == Method::kNearest) {
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
  resolved.polish = spec.polish.value_or(0);
  if (resolved.polish < 0 || resolved.polish > kMaxPolish) {
    return base::InvalidField(
        "spec.polish", absl::StrCat("expected 0 to ", kMaxPolish, ", got ", resolved.polish));
  }
  if (resolved.polish > 0 && resolved.rounding == Rounding::kStochastic) {
    return base::InvalidField(
        "spec.polish",
        absl::StrCat("expected 0 with ROUNDING_STOCHASTIC: codes moved for a smaller error are no "
                     "longer unbiased, and the bound on single outputs (B5) is lost; got ",
                     resolved.polish));
  }
  return absl::OkStatus();
}

absl::Status CheckFormat(const ResolvedSpec& spec) {
  const bool gptq = spec.format == Format::kGptq || spec.format == Format::kGptqV2;
  if (gptq && spec.scale_dtype != DType::kF16) {
    return base::InvalidField("spec.scale_dtype",
                              absl::StrCat("expected F16, the type GPTQ checkpoints "
                                           "store scales in, got ",
                                           Name(spec.scale_dtype)));
  }
  if (spec.format == Format::kGptq && !spec.symmetric) {
    return base::InvalidField(
        "spec.format",
        "FORMAT_GPTQ stores the zero point minus one, which cannot express a zero "
        "point of 0: expected FORMAT_GPTQ_V2 for an asymmetric grid");
  }
  if (spec.format == Format::kCompressedTensors && spec.bits != 2 && spec.bits != 4 &&
      spec.bits != 8) {
    return base::InvalidField("spec.bits",
                              absl::StrCat("expected 2, 4 or 8 with FORMAT_COMPRESSED_TENSORS (its "
                                           "readers disagree about the layout of others), got ",
                                           spec.bits));
  }
  return absl::OkStatus();
}

}  // namespace

absl::StatusOr<ResolvedSpec> ResolveSpec(const QuantizationSpec& given) {
  const QuantizationSpec spec = WithPreset(given);
  ResolvedSpec resolved;
  resolved.quality = spec.quality;

  resolved.bits = spec.bits.value_or(4);
  if (resolved.bits < 2 || resolved.bits > 8) {
    return base::InvalidField("spec.bits", absl::StrCat("expected 2 to 8, got ", resolved.bits));
  }
  resolved.symmetric = spec.symmetric.value_or(true);
  resolved.group_size = spec.group_size.value_or(0);
  if (resolved.group_size != 0 && resolved.group_size < 8) {
    return base::InvalidField(
        "spec.group_size",
        absl::StrCat("expected 0 (one scale an output channel) or at least 8, got ",
                     resolved.group_size));
  }
  resolved.method = spec.method.value_or(Method::kOptq);
  resolved.rounding = spec.rounding.value_or(Rounding::kNearest);
  resolved.order = spec.order.value_or(Order::kNatural);
  if (absl::Status status = ResolveGrid(spec, resolved); !status.ok()) return status;
  if (absl::Status status = CheckFormat(resolved); !status.ok()) return status;
  if (absl::Status status = ResolveSignedScales(spec, resolved); !status.ok()) return status;
  if (absl::Status status = ResolveSearch(spec, resolved); !status.ok()) return status;
  if (absl::Status status = ResolveDamping(spec, resolved); !status.ok()) return status;

  resolved.seed = spec.seed.value_or(0);
  resolved.per_row = spec.per_row.value_or(true);
  resolved.failure_probability = spec.failure_probability.value_or(1e-3);
  if (!(resolved.failure_probability > 0 && resolved.failure_probability < 1)) {
    return base::InvalidField(
        "spec.certificate.failure_probability",
        absl::StrCat("expected a number in (0, 1), got ", resolved.failure_probability));
  }
  resolved.compare_nearest = spec.compare_nearest.value_or(false);
  resolved.min_tokens = spec.min_tokens.value_or(1);
  if (resolved.min_tokens < 1) {
    return base::InvalidField("spec.min_tokens",
                              absl::StrCat("expected at least 1, got ", resolved.min_tokens));
  }

  return resolved;
}

absl::Status CheckSpecForLayer(const ResolvedSpec& spec, int64_t rows, int64_t features) {
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
  if (spec.format == Format::kGptq || spec.format == Format::kGptqV2) {
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

}  // namespace certiq::engine
