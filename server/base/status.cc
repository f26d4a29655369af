#include "base/status.h"

#include "absl/strings/cord.h"
#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"

namespace certiq::base {
namespace {

constexpr char kFieldUrl[] = "certiq/field";
constexpr char kPreconditionTypeUrl[] = "certiq/precondition-type";
constexpr char kPreconditionSubjectUrl[] = "certiq/precondition-subject";
constexpr char kRetryAfterUrl[] = "certiq/retry-after-ms";

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

absl::Status DrainingError() {
  absl::Status status = absl::UnavailableError("the server is draining and takes no new work");
  SetRetryAfter(status, kRetrySoon);
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

void SetRetryAfter(absl::Status& status, std::chrono::milliseconds delay) {
  status.SetPayload(kRetryAfterUrl, absl::Cord(absl::StrCat(delay.count())));
}

std::optional<std::chrono::milliseconds> RetryAfterOf(const absl::Status& status) {
  const auto payload = status.GetPayload(kRetryAfterUrl);
  int64_t milliseconds = 0;
  if (!payload.has_value() || !absl::SimpleAtoi(std::string(*payload), &milliseconds)) {
    return std::nullopt;
  }
  return std::chrono::milliseconds(milliseconds);
}

}  // namespace certiq::base
