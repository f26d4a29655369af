// Errors that cross module boundaries: absl::Status with machine-readable details.

#ifndef CERTIQ_BASE_STATUS_H_
#define CERTIQ_BASE_STATUS_H_

#include <chrono>
#include <cstdint>
#include <optional>
#include <string>

#include "absl/status/status.h"
#include "absl/strings/string_view.h"

namespace certiq::base {

// Details travel as payloads of the status; contract/rpc_status.h turns them into google.rpc
// messages.

// An error about one field of a request; `field` is its path in the contract, for example
// "spec.bits". `message` says what was expected and what came; the field's name is put before it.
absl::Status FieldError(absl::StatusCode code, absl::string_view field, absl::string_view message);

// INVALID_ARGUMENT about a field.
absl::Status InvalidField(absl::string_view field, absl::string_view message);

// INVALID_ARGUMENT: a value of a tensor that is not finite or beyond float32.
absl::Status NonFiniteValue(absl::string_view field, float value, int64_t row, int64_t column);

// FAILED_PRECONDITION: `type` is a stable upper-case word for programs, for example "DAMPING";
// `subject` is what it is about.
absl::Status PreconditionError(absl::string_view type, absl::string_view subject,
                               absl::string_view message);

// UNAVAILABLE with a retry delay: the one answer of a server that takes no new work.
absl::Status DrainingError();

// The field of FieldError, absent where there is none.
std::optional<std::string> FieldOf(const absl::Status& status);

struct Precondition {
  std::string type;
  std::string subject;
};
// The details of PreconditionError, absent where there are none.
std::optional<Precondition> PreconditionOf(const absl::Status& status);

// The delay for what passes by itself, such as a full queue.
inline constexpr std::chrono::milliseconds kRetrySoon{1000};

// Says when the same request may be tried again. It is not for what trying again cannot help, such
// as a layer larger than the whole budget: clients give up where there is no delay.
// REQUIRES: !status.ok().
void SetRetryAfter(absl::Status& status, std::chrono::milliseconds delay);

// What SetRetryAfter attached, absent where it was not called.
std::optional<std::chrono::milliseconds> RetryAfterOf(const absl::Status& status);

}  // namespace certiq::base

#endif  // CERTIQ_BASE_STATUS_H_
