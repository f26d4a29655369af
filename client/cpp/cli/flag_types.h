// Flag types that all verbs share, and the only place besides command.cc that includes CLI11.
#ifndef CERTIQ_CLIENT_CPP_CLI_FLAG_TYPES_H_
#define CERTIQ_CLIENT_CPP_CLI_FLAG_TYPES_H_

#include <cstdint>
#include <functional>
#include <initializer_list>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "absl/strings/ascii.h"
#include "absl/strings/str_cat.h"
#include "absl/time/time.h"
#include "google/protobuf/descriptor.h"
#include "google/protobuf/generated_enum_reflection.h"

namespace CLI {
class App;
}  // namespace CLI

namespace certiq::cli {

// Takes a value, or returns what was expected of one that does not fit.
using Setter = std::function<std::optional<std::string>(const std::string&)>;

// Adds a flag that may be given once. Values that do not fit are CLI::ValidationError.
void AddFlag(CLI::App* verb, const std::string& name, const std::string& type, const Setter& set,
             const std::string& help);

// Adds a flag that may be given several times, one value each.
void AddRepeatedFlag(CLI::App* verb, const std::string& name, const std::string& type,
                     const Setter& set, const std::string& help);

// Adds a flag without a value, which sets `*value` to true.
void AddSwitch(CLI::App* verb, const std::string& name, bool* value, const std::string& help);

// False where `text` is no number of the type; NaN and infinities are none.
bool ReadNumber(const std::string& text, int32_t* value);
bool ReadNumber(const std::string& text, int64_t* value);
bool ReadNumber(const std::string& text, uint64_t* value);
bool ReadNumber(const std::string& text, double* value);

// "a 32-bit integer": what ReadNumber expects.
const char* NumberKind(int32_t);
const char* NumberKind(int64_t);
const char* NumberKind(uint64_t);
const char* NumberKind(double);

template <typename Number>
void AddNumber(CLI::App* verb, const std::string& name, const std::string& type,
               std::function<void(Number)> set, const std::string& help) {
  AddFlag(
      verb, name, type,
      [set = std::move(set)](const std::string& text) -> std::optional<std::string> {
        Number value = 0;
        if (!ReadNumber(text, &value)) return NumberKind(value);
        set(value);
        return std::nullopt;
      },
      help);
}

void AddBool(CLI::App* verb, const std::string& name, std::function<void(bool)> set,
             const std::string& help);

// The flag takes "90s", "5m", "24h" or "1h30m", more than 0 and finite.
void AddDuration(CLI::App* verb, const std::string& name, std::function<void(absl::Duration)> set,
                 const std::string& help);

// The enum's value names in lower case without their prefix, so that flags follow the contract.
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

void AddText(CLI::App* verb, const std::string& name, const std::string& type, std::string* value,
             const std::string& help);

// As AddText, for a flag that may be given several times, one value each.
void AddTexts(CLI::App* verb, const std::string& name, const std::string& type,
              std::vector<std::string>* values, const std::string& help);

// Adds the verb's object, a value without a flag.
void AddObject(CLI::App* verb, const std::string& type, std::string* value,
               const std::string& help);

// Throws CLI::ParseError where a flag is unknown or one of `required` is missing; for OnParsed.
// CLI11's own required() would be checked before unknown flags, and a missing flag is often one
// that was misspelt.
void CheckFlags(const CLI::App& verb, std::initializer_list<const char*> required);

// Whether the command line has the flag or object.
bool IsGiven(const CLI::App& verb, const std::string& name);

// Throw CLI::ParseError: `flags` are used in a way that `problem` explains; one is missing.
[[noreturn]] void ThrowUsageError(const std::string& flags, const std::string& problem);
[[noreturn]] void ThrowMissing(const std::string& flags);

// Adds a verb. It takes unknown flags, for CheckFlags to name them.
CLI::App* AddVerb(CLI::App* app, const std::string& name, const std::string& description);

// Adds a noun such as "jobs", which needs a verb after it.
CLI::App* AddNoun(CLI::App* app, const std::string& name, const std::string& description);

// Calls `check` once all flags of the verb are parsed. It may throw CLI::ParseError.
void OnParsed(CLI::App* verb, std::function<void()> check);

}  // namespace certiq::cli

#endif  // CERTIQ_CLIENT_CPP_CLI_FLAG_TYPES_H_
