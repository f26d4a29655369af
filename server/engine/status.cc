#include "engine/status.h"

#include <utility>

#include "absl/strings/cord.h"
#include "absl/strings/str_cat.h"

namespace certiq::engine {
namespace {

constexpr char kFieldUrl[] = "certiq/field";
constexpr char kPreconditionTypeUrl[] = "certiq/precondition-type";
constexpr char kPreconditionSubjectUrl[] = "certiq/precondition-subject";
// One letter an attempt.
constexpr char kFailedAttemptsUrl[] = "certiq/failed-attempts";

constexpr std::pair<StabilityCause, char> kLetters[] = {
    {StabilityCause::kPivot, 'P'},
    {StabilityCause::kNonFinite, 'N'},
    {StabilityCause::kCondition, 'C'},
};

}  // namespace

absl::Status FieldError(absl::StatusCode code, absl::string_view field, absl::string_view message) {
  absl::Status status(code, absl::StrCat(field, ": ", message));
  status.SetPayload(kFieldUrl, absl::Cord(field));
  return status;
}

absl::Status InvalidField(absl::string_view field, absl::string_view message) {
  return FieldError(absl::StatusCode::kInvalidArgument, field, message);
}

absl::Status NonFiniteValue(absl::string_view field, float value, int64_t row, int64_t column) {
  return InvalidField(field, absl::StrCat("expected finite values within float32's range, got ",
                                          value, " at row ", row, ", column ", column));
}

absl::Status PreconditionError(absl::string_view type, absl::string_view subject,
                               absl::string_view message) {
  absl::Status status(absl::StatusCode::kFailedPrecondition, message);
  status.SetPayload(kPreconditionTypeUrl, absl::Cord(type));
  status.SetPayload(kPreconditionSubjectUrl, absl::Cord(subject));
  return status;
}

std::optional<std::string> FieldOf(const absl::Status& status) {
  const auto payload = status.GetPayload(kFieldUrl);
  if (!payload.has_value()) return std::nullopt;
  return std::string(*payload);
}

std::optional<Precondition> PreconditionOf(const absl::Status& status) {
  const auto type = status.GetPayload(kPreconditionTypeUrl);
  const auto subject = status.GetPayload(kPreconditionSubjectUrl);
  if (!type.has_value() || !subject.has_value()) return std::nullopt;
  return Precondition{std::string(*type), std::string(*subject)};
}

void AttachFailedAttempts(const std::vector<StabilityCause>& causes, absl::Status& status) {
  std::string letters;
  for (const StabilityCause cause : causes) {
    for (const auto& [known, letter] : kLetters) {
      if (known == cause) letters.push_back(letter);
    }
  }
  if (!letters.empty()) status.SetPayload(kFailedAttemptsUrl, absl::Cord(letters));
}

std::vector<StabilityCause> FailedAttemptsOf(const absl::Status& status) {
  std::vector<StabilityCause> causes;
  const auto payload = status.GetPayload(kFailedAttemptsUrl);
  if (!payload.has_value()) return causes;
  for (const char letter : std::string(*payload)) {
    for (const auto& [cause, known] : kLetters) {
      if (known == letter) causes.push_back(cause);
    }
  }
  return causes;
}

}  // namespace certiq::engine
