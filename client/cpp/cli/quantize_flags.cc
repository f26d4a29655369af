#include "quantize_flags.h"

#include <array>
#include <cmath>
#include <functional>
#include <utility>

#include "CLI/CLI.hpp"
#include "absl/strings/ascii.h"
#include "absl/strings/match.h"
#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_split.h"

namespace certiq::cli {
namespace {

CLI::ValidationError BadValue(const std::string& flag, const std::string& expected,
                              const std::string& got) {
  return CLI::ValidationError(flag, absl::StrCat("expected ", expected, ", got \"", got, "\""));
}

bool ReadNumber(const std::string& text, int32_t* value) { return absl::SimpleAtoi(text, value); }
bool ReadNumber(const std::string& text, uint64_t* value) { return absl::SimpleAtoi(text, value); }
bool ReadNumber(const std::string& text, double* value) {
  return absl::SimpleAtod(text, value) && std::isfinite(*value);
}

const char* Kind(int32_t) { return "a 32-bit integer"; }
const char* Kind(uint64_t) { return "an integer from 0 to 2^64 - 1"; }
const char* Kind(double) { return "a number"; }

// A flag whose value goes through `set`, which returns what was expected if it does not fit.
using Setter = std::function<std::optional<std::string>(const std::string&)>;

void AddFlag(CLI::App* verb, const std::string& name, const std::string& type, const Setter& set,
             const std::string& help) {
  verb->add_option_function<std::string>(
          name,
          [name, set](const std::string& text) {
            const std::optional<std::string> expected = set(text);
            if (expected.has_value()) throw BadValue(name, *expected, text);
          },
          help)
      ->type_name(type);
}

template <typename Number>
void AddNumber(CLI::App* verb, const std::string& name, const std::string& type,
               std::function<void(Number)> set, const std::string& help) {
  AddFlag(
      verb, name, type,
      [set = std::move(set)](const std::string& text) -> std::optional<std::string> {
        Number value = 0;
        if (!ReadNumber(text, &value)) return Kind(value);
        set(value);
        return std::nullopt;
      },
      help);
}

void AddBool(CLI::App* verb, const std::string& name, std::function<void(bool)> set,
             const std::string& help) {
  AddFlag(
      verb, name, "true|false",
      [set = std::move(set)](const std::string& text) -> std::optional<std::string> {
        if (text != "true" && text != "false") return "true or false";
        set(text == "true");
        return std::nullopt;
      },
      help);
}

// The enum's value names in lower case without their prefix: what the contract's enums give for
// free stays in step with it.
template <typename Enum>
std::vector<std::pair<std::string, Enum>> Choices(const std::string& prefix) {
  std::vector<std::pair<std::string, Enum>> choices;
  const google::protobuf::EnumDescriptor* const all = google::protobuf::GetEnumDescriptor<Enum>();
  for (int i = 0; i < all->value_count(); ++i) {
    if (all->value(i)->number() == 0) continue;
    choices.emplace_back(absl::AsciiStrToLower(all->value(i)->name().substr(prefix.size())),
                         static_cast<Enum>(all->value(i)->number()));
  }
  return choices;
}

template <typename Enum>
void AddChoice(CLI::App* verb, const std::string& name,
               const std::vector<std::pair<std::string, Enum>>& choices,
               std::function<void(Enum)> set, const std::string& help) {
  std::string names;
  for (const auto& choice : choices)
    absl::StrAppend(&names, names.empty() ? "" : "|", choice.first);
  AddFlag(
      verb, name, names,
      [choices, names,
       set = std::move(set)](const std::string& text) -> std::optional<std::string> {
        for (const auto& [choice, value] : choices) {
          if (choice != text) continue;
          set(value);
          return std::nullopt;
        }
        return names;
      },
      help);
}

std::optional<std::string> ReadDamping(const std::string& text, v1::Damping* damping) {
  constexpr char kExpected[] =
      "relative_trace:NUMBER, absolute:NUMBER, relative_sigma_max:NUMBER or held_out";
  if (text == "held_out") {
    damping->mutable_held_out();
    return std::nullopt;
  }
  const std::pair<std::string, std::string> parts = absl::StrSplit(text, absl::MaxSplits(':', 1));
  double value = 0;
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

void AddFileFlags(CLI::App* verb, QuantizeFlags* flags) {
  AddConnectionFlags(verb, &flags->connection);
  verb->add_option("--weights", flags->weights_file, "File with the weights (required)")
      ->type_name("F.safetensors");
  verb->add_option("--weight", flags->weight,
                   "The weights' tensor [R, N] (required); also the layer's name")
      ->type_name("NAME");
  verb->add_option("--activations", flags->activations_file, "File with the activations")
      ->type_name("F.safetensors");
  verb->add_option("--x", flags->x, "Activations [tokens, N] of the float model")
      ->type_name("NAME");
  verb->add_option("--x_quantized", flags->x_quantized,
                   "The same tokens as the layer sees them once earlier layers are quantized")
      ->type_name("NAME");
  verb->add_option("--calibration", flags->calibration,
                   "A finalized calibration instead of activations")
      ->type_name("ID");
  verb->add_option("--output", flags->output_file,
                   "Where the result goes; not written if not given")
      ->type_name("OUT.safetensors");
  verb->add_option("--report", flags->report_file,
                   "Where the certificate goes as JSON; not written if not given")
      ->type_name("REPORT.json");
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
      "Layout of the result (default dense_f32)");
}

void AddMethodFlags(CLI::App* verb, v1::QuantizationSpec* spec, QuantizeFlags* flags) {
  AddChoice<v1::Method>(
      verb, "--method", Choices<v1::Method>("METHOD_"),
      [spec](v1::Method value) { spec->set_method(value); }, "How codes are chosen (default optq)");
  AddChoice<v1::Rounding>(
      verb, "--rounding", Choices<v1::Rounding>("ROUNDING_"),
      [spec](v1::Rounding value) { spec->set_rounding(value); }, "(default nearest)");
  AddNumber<uint64_t>(
      verb, "--seed", "S", [spec](uint64_t value) { spec->set_seed(value); },
      "Reproduces stochastic rounding");
  AddChoice<v1::Order>(
      verb, "--order", Choices<v1::Order>("ORDER_"),
      [spec](v1::Order value) { spec->set_order(value); },
      "Order in which features are quantized (default natural)");
  AddNumber<int32_t>(
      verb, "--polish", "P", [spec](int32_t value) { spec->set_polish(value); },
      "Passes of coordinate descent after the sweep (default 0)");
  AddFlag(
      verb, "--damping", "RULE:VALUE|held_out",
      [spec](const std::string& text) { return ReadDamping(text, spec->mutable_damping()); },
      "relative_trace:0.01 (default), absolute:1, relative_sigma_max:1e-6 or held_out");
  AddNumber<double>(
      verb, "--held_out_fraction", "F", [flags](double value) { flags->held_out_fraction = value; },
      "Share of the tokens kept out of the fit (default 1/8 where damping needs it, else 0)");
  AddChoice<v1::OnFailure>(
      verb, "--on_failure", Choices<v1::OnFailure>("ON_FAILURE_"),
      [spec](v1::OnFailure value) { spec->mutable_damping()->set_on_failure(value); },
      "When every damping attempt failed: fail, or round plainly (default fail)");
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
}

// Which flags are required, and which need which. CLI11's own required() would speak before an
// unknown flag is named, which is often the misspelt flag that it then misses.
void CheckTogether(const CLI::App& verb, const QuantizeFlags& flags) {
  if (const auto unknown = verb.remaining(); !unknown.empty()) {
    throw CLI::ExtrasError(verb.get_name(), unknown);
  }
  CheckConnection(verb, flags.connection);
  for (const char* name : {"--weights", "--weight"}) {
    if (verb.count(name) == 0) throw CLI::RequiredError(name);
  }
  const bool activations = !flags.activations_file.empty();
  if (activations != !flags.x.empty()) {
    throw CLI::ValidationError("--activations and --x", "expected both or none");
  }
  if (!activations && flags.calibration.empty()) {
    throw CLI::RequiredError("--activations and --x, or --calibration,");
  }
  if (!flags.x_quantized.empty() && !activations) {
    throw CLI::ValidationError("--x_quantized", "expected --activations and --x beside it");
  }
  if (!flags.output_file.empty() && flags.output_file == flags.report_file) {
    throw CLI::ValidationError("--output and --report", "expected two different files");
  }
}

}  // namespace

CLI::App* AddQuantizeVerb(CLI::App* app, QuantizeFlags* flags) {
  CLI::App* const verb = app->add_subcommand("quantize", "Quantize one layer");
  flags->spec.mutable_certificate()->set_compare_nearest(true);
  AddFileFlags(verb, flags);
  AddMethodFlags(verb, &flags->spec, flags);
  AddGridFlags(verb, &flags->spec);
  verb->allow_extras();
  verb->callback([verb, flags] { CheckTogether(*verb, *flags); });
  return verb;
}

std::string FlagForField(const std::string& field) {
  // Longest first where one is the beginning of another.
  static constexpr std::array<std::pair<const char*, const char*>, 27> kFlags = {{
      {"spec.method", "--method"},
      {"spec.bits", "--bits"},
      {"spec.symmetric", "--symmetric"},
      {"spec.group_size", "--group_size"},
      {"spec.scale_dtype", "--scale_dtype"},
      {"spec.group_scales", "--group_scales"},
      {"spec.scale_trials", "--scale_trials"},
      {"spec.scale", "--scale"},
      {"spec.polish", "--polish"},
      {"spec.rounding", "--rounding"},
      {"spec.seed", "--seed"},
      {"spec.order", "--order"},
      {"spec.damping.on_failure", "--on_failure"},
      {"spec.damping", "--damping"},
      {"spec.format", "--format"},
      {"spec.quality", "--quality"},
      {"spec.certificate.per_row", "--per_row"},
      {"spec.certificate.compare_nearest", "--compare_nearest"},
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
