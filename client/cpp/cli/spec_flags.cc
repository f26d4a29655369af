#include "spec_flags.h"

#include <array>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "CLI/CLI.hpp"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_split.h"
#include "flag_types.h"
#include "readers_help.h"

namespace certiq::cli {
namespace {

std::optional<std::string> ReadDamping(const std::string& text, v1::Damping* damping) {
  constexpr char kExpected[] =
      "relative_trace:NUMBER, absolute:NUMBER, relative_sigma_max:NUMBER, held_out, "
      "held_out:NUMBER,NUMBER,..., held_out_climb or held_out_climb:NUMBER,NUMBER,...";
  const std::pair<std::string, std::string> parts = absl::StrSplit(text, absl::MaxSplits(':', 1));
  double value = 0;
  if (parts.first == "held_out" || parts.first == "held_out_climb") {
    v1::HeldOutDamping* const held_out = damping->mutable_held_out();
    if (parts.first == "held_out_climb") held_out->set_climb(true);
    if (text == parts.first) return std::nullopt;
    for (const absl::string_view step : absl::StrSplit(parts.second, ',')) {
      if (!ReadNumber(std::string(step), &value)) return kExpected;
      held_out->add_ladder(value);
    }
    return std::nullopt;
  }
  if (!ReadNumber(parts.second, &value)) return kExpected;
  if (parts.first == "relative_trace") {
    damping->set_relative_trace(value);
  } else if (parts.first == "absolute") {
    damping->set_absolute(value);
  } else if (parts.first == "relative_sigma_max") {
    damping->set_relative_sigma_max(value);
  } else {
    return kExpected;
  }
  return std::nullopt;
}

void AddGridFlags(CLI::App* verb, v1::QuantizationSpec* spec) {
  AddNumber<int32_t>(
      verb, "--bits", "B", [spec](int32_t value) { spec->set_bits(value); },
      "Bits a code, 2 to 8 (server's default 4)");
  AddNumber<int32_t>(
      verb, "--group_size", "G", [spec](int32_t value) { spec->set_group_size(value); },
      "Features that share a scale; 0: one scale a row (default)");
  AddBool(
      verb, "--symmetric", [spec](bool value) { spec->set_symmetric(value); },
      "false: a zero point beside each scale (default true)");
  AddChoice<v1::GroupScales>(
      verb, "--group_scales", Choices<v1::GroupScales>("GROUP_SCALES_"),
      [spec](v1::GroupScales value) { spec->set_group_scales(value); },
      "Scales of groups from the original or the updated weights (default static)");
  AddChoice<v1::ScaleRule>(
      verb, "--scale", Choices<v1::ScaleRule>("SCALE_RULE_"),
      [spec](v1::ScaleRule value) { spec->set_scale(value); },
      "How a scale is found (default absmax)");
  AddChoice<v1::ScaleObjective>(
      verb, "--scale_objective", Choices<v1::ScaleObjective>("SCALE_OBJECTIVE_"),
      [spec](v1::ScaleObjective value) { spec->set_scale_objective(value); },
      "What piso scales are judged by (default mixed for nearest, else quantized_inputs)");
  AddNumber<int32_t>(
      verb, "--scale_passes", "N", [spec](int32_t value) { spec->set_scale_passes(value); },
      "Passes of piso over the groups of a row, 0: each by itself (default 3 for nearest, else 0)");
  AddBool(
      verb, "--signed_scales", [spec](bool value) { spec->set_signed_scales(value); },
      "true: a search may give a symmetric grid a negative scale (default false)");
  AddNumber<int32_t>(
      verb, "--scale_trials", "N", [spec](int32_t value) { spec->set_scale_trials(value); },
      "Sweeps tried around the scale found");
  AddChoice<v1::DataType>(
      verb, "--scale_dtype",
      {{"f16", v1::DATA_TYPE_F16}, {"bf16", v1::DATA_TYPE_BF16}, {"f32", v1::DATA_TYPE_F32}},
      [spec](v1::DataType value) { spec->set_scale_dtype(value); },
      "Type of stored scales (default f32 for dense formats, f16 for packed ones)");
  AddChoice<v1::Format>(
      verb, "--format", Choices<v1::Format>("FORMAT_"),
      [spec](v1::Format value) { spec->set_format(value); },
      "Layout of the result (default dense_f32); who loads it stands below");
}

// The contract's methods, and the names under which other tools know two of them.
std::vector<std::pair<std::string, v1::Method>> MethodChoices() {
  std::vector<std::pair<std::string, v1::Method>> choices = Choices<v1::Method>("METHOD_");
  choices.emplace_back("rtn", v1::METHOD_NEAREST);
  choices.emplace_back("gptq", v1::METHOD_OPTQ);
  return choices;
}

void AddMethodFlags(CLI::App* verb, v1::QuantizationSpec* spec) {
  AddChoice<v1::Method>(
      verb, "--method", MethodChoices(), [spec](v1::Method value) { spec->set_method(value); },
      "How codes are chosen (default optq); rtn is nearest, gptq is optq");
  AddChoice<v1::Rounding>(
      verb, "--rounding", Choices<v1::Rounding>("ROUNDING_"),
      [spec](v1::Rounding value) { spec->set_rounding(value); },
      "To the nearest level, or at random without bias (default nearest)");
  AddNumber<uint64_t>(
      verb, "--seed", "S", [spec](uint64_t value) { spec->set_seed(value); },
      "Reproduces stochastic rounding");
  AddChoice<v1::Order>(
      verb, "--order", Choices<v1::Order>("ORDER_"),
      [spec](v1::Order value) { spec->set_order(value); },
      "Order in which features are quantized (default natural)");
  for (const char* const name : {"--desc_act", "--act_order"}) {
    AddBool(
        verb, name,
        [spec](bool value) {
          spec->set_order(value ? v1::ORDER_DECREASING_NORM : v1::ORDER_NATURAL);
        },
        "GPTQ's name for --order: true is decreasing_norm, false is natural");
  }
  AddNumber<int32_t>(
      verb, "--polish", "P", [spec](int32_t value) { spec->set_polish(value); },
      "Passes of coordinate descent after the sweep (default 0)");
  AddFlag(
      verb, "--damping", "RULE[:VALUE]",
      [spec](const std::string& text) { return ReadDamping(text, spec->mutable_damping()); },
      "relative_trace:0.01 (default), absolute:1, relative_sigma_max:1e-6, held_out, or "
      "held_out:0.001,0.01,0.1 with candidates of your own; held_out_climb tries only as many as "
      "it takes and prefers the most damped of the best");
  AddNumber<double>(
      verb, "--damp_percent", "P",
      [spec](double value) { spec->mutable_damping()->set_relative_trace(value); },
      "GPTQ's name for --damping relative_trace:P; a fraction, such as 0.01");
  AddNumber<int32_t>(
      verb, "--max_attempts", "N",
      [spec](int32_t value) { spec->mutable_damping()->set_max_attempts(value); },
      "Damping attempts in all, 1 to 20 (default 5)");
  AddNumber<double>(
      verb, "--damping_factor", "F",
      [spec](double value) { spec->mutable_damping()->set_factor(value); },
      "Each attempt multiplies the damping by this, above 1 (default 10)");
  AddChoice<v1::OnFailure>(
      verb, "--on_failure", Choices<v1::OnFailure>("ON_FAILURE_"),
      [spec](v1::OnFailure value) { spec->mutable_damping()->set_on_failure(value); },
      "When every damping attempt failed: fail, or round plainly (default fail)");
}

void AddReportFlags(CLI::App* verb, v1::QuantizationSpec* spec) {
  AddChoice<v1::Quality>(
      verb, "--quality", Choices<v1::Quality>("QUALITY_"),
      [spec](v1::Quality value) { spec->set_quality(value); },
      "Preset for every flag that is not given");
  AddBool(
      verb, "--compare_nearest",
      [spec](bool value) { spec->mutable_certificate()->set_compare_nearest(value); },
      "Also measure plain rounding. Unlike the server's default this is true unless given as "
      "false, because the summary compares with plain rounding");
  AddBool(
      verb, "--per_row", [spec](bool value) { spec->mutable_certificate()->set_per_row(value); },
      "Errors and bounds of every row in the report (default true)");
  AddNumber<double>(
      verb, "--failure_probability", "P",
      [spec](double value) { spec->mutable_certificate()->set_failure_probability(value); },
      "Of the bound on single outputs with stochastic rounding (default 1e-3)");
  AddNumber<int64_t>(
      verb, "--min_tokens", "N", [spec](int64_t value) { spec->set_min_tokens(value); },
      "Reject fewer tokens to fit than this (default 1)");
}

}  // namespace

void AddSpecFlags(CLI::App* verb, v1::QuantizationSpec* spec) {
  spec->mutable_certificate()->set_compare_nearest(true);
  AddMethodFlags(verb, spec);
  AddGridFlags(verb, spec);
  AddReportFlags(verb, spec);
  verb->footer(ReadersText());
}

void CheckSpecFlags(const CLI::App& verb) {
  static constexpr std::array<std::pair<const char*, const char*>, 4> kSameField = {{
      {"--order", "--desc_act"},
      {"--order", "--act_order"},
      {"--desc_act", "--act_order"},
      {"--damping", "--damp_percent"},
  }};
  for (const auto& [one, other] : kSameField) {
    if (!IsGiven(verb, one) || !IsGiven(verb, other)) continue;
    ThrowUsageError(absl::StrCat(one, " and ", other), "expected one of them");
  }
}

}  // namespace certiq::cli
