#include "engine/linalg/failed_attempts.h"

#include <string>
#include <utility>

#include "absl/strings/cord.h"

namespace certiq::engine {
namespace {

// The payload has one letter an attempt.
constexpr char kFailedAttemptsUrl[] = "certiq/failed-attempts";

constexpr std::pair<StabilityCause, char> kLetters[] = {
    {StabilityCause::kPivot, 'P'},
    {StabilityCause::kNonFinite, 'N'},
    {StabilityCause::kCondition, 'C'},
};

}  // namespace

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
