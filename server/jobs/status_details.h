// Details of an error that only jobs/ attaches; engine/status.h has the rest.

#ifndef CERTIQ_JOBS_STATUS_DETAILS_H_
#define CERTIQ_JOBS_STATUS_DETAILS_H_

#include <chrono>
#include <optional>

#include "absl/status/status.h"

namespace certiq::jobs {

// For what will pass by itself, such as a full queue.
inline constexpr std::chrono::milliseconds kRetrySoon{1000};

// Says when the same request may be tried again. Not for what trying again cannot help, such as a
// layer larger than the whole budget: clients give up where there is no delay.
// REQUIRES: !status.ok().
void SetRetryAfter(absl::Status& status, std::chrono::milliseconds delay);

// What SetRetryAfter attached, absent where it was not called.
std::optional<std::chrono::milliseconds> RetryAfterOf(const absl::Status& status);

// UNAVAILABLE with a retry delay: another call with this request_id is at it.
absl::Status BeingCreated();

}  // namespace certiq::jobs

#endif  // CERTIQ_JOBS_STATUS_DETAILS_H_
