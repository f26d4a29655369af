#include "quantize_flags.h"

#include <array>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/strings/strip.h"
#include "flag_types.h"
#include "spec_flags.h"

namespace certiq::cli {
namespace {

void AddFileFlags(CLI::App* verb, QuantizeFlags* flags) {
  AddConnectionFlags(verb, &flags->connection);
  AddWeightFlags(verb, flags);
  AddActivationFlags(verb, flags);
  AddText(verb, "--calibration", "ID|LABEL", &flags->calibration,
          "A finalized calibration instead of activations");
  AddNumber<double>(
      verb, "--held_out_fraction", "F", [flags](double value) { flags->held_out_fraction = value; },
      "Share of the tokens kept out of the fit (default 1/8 where damping needs it, else 0)");
  AddNumber<int32_t>(
      verb, "--sequence_rows", "ROWS", [flags](int32_t value) { flags->sequence_rows = value; },
      "Rows of one sequence, which holding tokens out never cuts (default: blocks of 256 rows)");
  AddOutputFlags(verb, flags);
}

void CheckTogether(const CLI::App& verb, const QuantizeFlags& flags) {
  CheckFlags(verb, {});
  CheckConnection(verb, flags.connection);
  CheckFlags(verb, {"--weights", "--weight"});
  const bool activations = !flags.activations_file.empty();
  if (!activations && flags.x.empty() && flags.calibration.empty()) {
    ThrowMissing("--activations and --x, or --calibration,");
  }
  if (activations && !flags.calibration.empty()) {
    ThrowUsageError("--activations and --calibration", "expected one of them");
  }
  CheckActivationFlags(flags);
  for (const char* const name : {"--held_out_fraction", "--sequence_rows"}) {
    if (activations || !IsGiven(verb, name)) continue;
    // A calibration has held its tokens out already.
    ThrowUsageError(name, "expected --activations and --x beside it");
  }
  CheckOutputFlags(flags);
  CheckSpecFlags(verb);
}

}  // namespace

CLI::App* AddQuantizeVerb(CLI::App* app, QuantizeFlags* flags) {
  CLI::App* const verb = AddVerb(app, "quantize", "Quantize one layer");
  AddFileFlags(verb, flags);
  AddSpecFlags(verb, &flags->spec);
  OnParsed(verb, [verb, flags] { CheckTogether(*verb, *flags); });
  return verb;
}

std::string FlagForField(const std::string& field) {
  // Where one field begins with another, the longer one comes first.
  static constexpr std::array<std::pair<const char*, const char*>, 42> kFlags = {{
      {"spec.method", "--method"},
      {"spec.bits", "--bits"},
      {"spec.symmetric", "--symmetric"},
      {"spec.group_size", "--group_size"},
      {"spec.scale_dtype", "--scale_dtype"},
      {"spec.group_scales", "--group_scales"},
      {"spec.scale_trials", "--scale_trials"},
      {"spec.signed_scales", "--signed_scales"},
      {"spec.scale", "--scale"},
      {"spec.polish", "--polish"},
      {"spec.rounding", "--rounding"},
      {"spec.seed", "--seed"},
      {"spec.order", "--order"},
      {"spec.damping.on_failure", "--on_failure"},
      {"spec.damping.max_attempts", "--max_attempts"},
      {"spec.damping.factor", "--damping_factor"},
      {"spec.damping", "--damping"},
      {"spec.format", "--format"},
      {"spec.quality", "--quality"},
      {"spec.certificate.per_row", "--per_row"},
      {"spec.certificate.compare_nearest", "--compare_nearest"},
      {"spec.certificate.failure_probability", "--failure_probability"},
      {"spec.min_tokens", "--min_tokens"},
      {"sequence_rows", "--sequence_rows"},
      {"features", "--features"},
      {"labels", "--label"},
      {"ttl", "--ttl"},
      {"priority", "--priority"},
      {"deadline", "--deadline"},
      {"request_id", "--request_id"},
      {"stream_id", "--stream"},
      {"tokens", "--tokens"},
      {"expected_tokens", "--expected_tokens"},
      {"held_out_fraction", "--held_out_fraction"},
      {"calibration_id", "--calibration"},
      {"layer_name", "--weight"},
      {"weight", "--weight"},
      {"x_quantized", "--x_quantized"},
      {"activation.x_quantized", "--x_quantized"},
      {"activation.x", "--x"},
      {"activation", "--x"},
      {"x", "--x"},
  }};
  absl::string_view path = field;
  absl::ConsumePrefix(&path, "header.");
  for (const auto& [prefix, flag] : kFlags) {
    absl::string_view rest = path;
    if (absl::ConsumePrefix(&rest, prefix) &&
        (rest.empty() || rest.front() == '.' || rest.front() == '[')) {
      return flag;
    }
  }
  return "";
}

}  // namespace certiq::cli
