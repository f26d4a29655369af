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

// An error about one field of a request. `field` is its path in the contract, for example
// "spec.bits". `message` says what was expected and what came; "FIELD: " is put before it.
absl::Status FieldError(absl::StatusCode code, absl::string_view field, absl::string_view message);

// FieldError with INVALID_ARGUMENT.
absl::Status InvalidField(absl::string_view field, absl::string_view message);

// INVALID_ARGUMENT about a tensor's value that is not finite or passes float32's range.
absl::Status NonFiniteValue(absl::string_view field, float value, int64_t row, int64_t column);

// FAILED_PRECONDITION. `type` is a stable upper-case word for programs, for example "DAMPING";
// `subject` names the resource or field that the precondition is about.
absl::Status PreconditionError(absl::string_view type, absl::string_view subject,
                               absl::string_view message);

// UNAVAILABLE with a retry delay. Every call that a draining server refuses gets this status.
absl::Status DrainingError();

// The field that FieldError attached, absent from other statuses.
std::optional<std::string> FieldOf(const absl::Status& status);

struct Precondition {
  std::string type;
  std::string subject;
};
// The details that PreconditionError attached, absent from other statuses.
std::optional<Precondition> PreconditionOf(const absl::Status& status);

// The delay for a shortage that passes by itself, such as a full queue.
inline constexpr std::chrono::milliseconds kRetrySoon{1000};

// Attaches the delay after which a client may send the same request again. A request that can never
// succeed, such as a layer larger than the whole budget, gets none: clients give up without it.
// REQUIRES: !status.ok().
void SetRetryAfter(absl::Status& status, std::chrono::milliseconds delay);

// The delay that SetRetryAfter attached, absent from other statuses.
std::optional<std::chrono::milliseconds> RetryAfterOf(const absl::Status& status);

}  // namespace certiq::base

#endif  // CERTIQ_BASE_STATUS_H_
