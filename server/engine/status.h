// Errors that cross module boundaries: absl::Status with machine-readable
// details attached as payloads, which rpc/ turns into google.rpc messages.

#ifndef CERTIQ_ENGINE_STATUS_H_
#define CERTIQ_ENGINE_STATUS_H_

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/strings/string_view.h"
#include "engine/stability.h"

namespace certiq::engine {

// An error about one field of a request; `field` is its path in the proto,
// for example "spec.bits". The message should say what was expected and what
// came; it is prefixed with the field's name.
absl::Status FieldError(absl::StatusCode code, absl::string_view field, absl::string_view message);

// INVALID_ARGUMENT about a field.
absl::Status InvalidField(absl::string_view field, absl::string_view message);

// INVALID_ARGUMENT: a value of a tensor that is not finite or beyond float32.
absl::Status NonFiniteValue(absl::string_view field, float value, int64_t row, int64_t column);

// FAILED_PRECONDITION: `type` is a stable upper-case word for programs, for
// example "DAMPING"; `subject` is what it is about.
absl::Status PreconditionError(absl::string_view type, absl::string_view subject,
                               absl::string_view message);

// The details attached above, absent where there are none.
std::optional<std::string> FieldOf(const absl::Status& status);
struct Precondition {
  std::string type;
  std::string subject;
};
std::optional<Precondition> PreconditionOf(const absl::Status& status);

// Attaches why each damping attempt failed, in order; none of them kNone.
void AttachFailedAttempts(const std::vector<StabilityCause>& causes, absl::Status& status);
// What was attached; empty where nothing was.
std::vector<StabilityCause> FailedAttemptsOf(const absl::Status& status);

}  // namespace certiq::engine

#endif  // CERTIQ_ENGINE_STATUS_H_
