#include "jobs/status_details.h"

#include <cstdint>
#include <string>

#include "absl/strings/cord.h"
#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"

namespace certiq::jobs {
namespace {
constexpr char kRetryAfterUrl[] = "certiq/retry-after-ms";
}  // namespace

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

absl::Status BeingCreated() {
  absl::Status status =
      absl::UnavailableError("another call with this request_id is under way; try again");
  SetRetryAfter(status, kRetrySoon);
  return status;
}

}  // namespace certiq::jobs
