#include "flag_types.h"

#include <cmath>
#include <utility>

#include "CLI/CLI.hpp"
#include "absl/strings/numbers.h"

namespace certiq::cli {
namespace {

void Set(const std::string& name, const Setter& set, const std::string& text) {
  const std::optional<std::string> expected = set(text);
  if (!expected.has_value()) return;
  ThrowUsageError(name, absl::StrCat("expected ", *expected, ", got \"", text, "\""));
}

}  // namespace

bool ReadNumber(const std::string& text, int32_t* value) { return absl::SimpleAtoi(text, value); }
bool ReadNumber(const std::string& text, int64_t* value) { return absl::SimpleAtoi(text, value); }
bool ReadNumber(const std::string& text, uint64_t* value) { return absl::SimpleAtoi(text, value); }
bool ReadNumber(const std::string& text, double* value) {
  return absl::SimpleAtod(text, value) && std::isfinite(*value);
}

const char* NumberKind(int32_t) { return "a 32-bit integer"; }
const char* NumberKind(int64_t) { return "a 64-bit integer"; }
const char* NumberKind(uint64_t) { return "an integer from 0 to 2^64 - 1"; }
const char* NumberKind(double) { return "a number"; }

void AddFlag(CLI::App* verb, const std::string& name, const std::string& type, const Setter& set,
             const std::string& help) {
  verb->add_option_function<std::string>(
          name, [name, set](const std::string& text) { Set(name, set, text); }, help)
      ->type_name(type);
}

void AddRepeatedFlag(CLI::App* verb, const std::string& name, const std::string& type,
                     const Setter& set, const std::string& help) {
  verb->add_option_function<std::vector<std::string>>(
          name,
          [name, set](const std::vector<std::string>& texts) {
            for (const std::string& text : texts) Set(name, set, text);
          },
          help)
      ->type_name(type)
      ->allow_extra_args(false);
}

void AddSwitch(CLI::App* verb, const std::string& name, bool* value, const std::string& help) {
  verb->add_flag(name, *value, help);
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

void AddDuration(CLI::App* verb, const std::string& name, std::function<void(absl::Duration)> set,
                 const std::string& help) {
  AddFlag(
      verb, name, "DURATION",
      [set = std::move(set)](const std::string& text) -> std::optional<std::string> {
        absl::Duration duration;
        if (!absl::ParseDuration(text, &duration) || duration <= absl::ZeroDuration() ||
            duration == absl::InfiniteDuration()) {
          return "a duration above 0 such as 90s, 5m or 24h";
        }
        set(duration);
        return std::nullopt;
      },
      help);
}

void AddText(CLI::App* verb, const std::string& name, const std::string& type, std::string* value,
             const std::string& help) {
  verb->add_option(name, *value, help)->type_name(type);
}

void AddTexts(CLI::App* verb, const std::string& name, const std::string& type,
              std::vector<std::string>* values, const std::string& help) {
  verb->add_option(name, *values, help)->type_name(type)->allow_extra_args(false);
}

void AddObject(CLI::App* verb, const std::string& type, std::string* value,
               const std::string& help) {
  verb->add_option(type, *value, help)->type_name("");
}

void CheckFlags(const CLI::App& verb, std::initializer_list<const char*> required) {
  if (const auto unknown = verb.remaining(); !unknown.empty()) {
    throw CLI::ExtrasError(verb.get_name(), unknown);
  }
  for (const char* const name : required) {
    if (!IsGiven(verb, name)) ThrowMissing(name);
  }
}

bool IsGiven(const CLI::App& verb, const std::string& name) { return verb.count(name) > 0; }

void ThrowUsageError(const std::string& flags, const std::string& problem) {
  throw CLI::ValidationError(flags, problem);
}

void ThrowMissing(const std::string& flags) { throw CLI::RequiredError(flags); }

CLI::App* AddVerb(CLI::App* app, const std::string& name, const std::string& description) {
  CLI::App* const verb = app->add_subcommand(name, description);
  verb->allow_extras();
  return verb;
}

CLI::App* AddNoun(CLI::App* app, const std::string& name, const std::string& description) {
  CLI::App* const noun = app->add_subcommand(name, description);
  noun->require_subcommand(1);
  return noun;
}

void OnParsed(CLI::App* verb, std::function<void()> check) { verb->callback(std::move(check)); }

}  // namespace certiq::cli
