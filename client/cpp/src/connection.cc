#include "connection.h"

#include "absl/strings/str_cat.h"
#include "base/status_macros.h"
#include "request_check.h"

namespace certiq {

absl::Status CompleteOptions(ClientOptions* options) {
  RETURN_IF_ERROR(CheckAddress(options->address));
  if (options->chunk_bytes < 1 || options->chunk_bytes > kMaxRowBytes) {
    return absl::InvalidArgumentError(
        absl::StrCat("chunk_bytes: expected 1 to ", kMaxRowBytes, ", got ", options->chunk_bytes));
  }
  if (options->retry.max_attempts < 1) {
    return absl::InvalidArgumentError(
        absl::StrCat("retry.max_attempts: expected at least 1, got ", options->retry.max_attempts));
  }
  if (options->connect_timeout < absl::Milliseconds(1) ||
      options->connect_timeout > absl::Hours(1)) {
    return absl::InvalidArgumentError("connect_timeout: expected 1 ms to 1 h");
  }
  if (!options->sleep) options->sleep = SleepUnlessStopped;
  return absl::OkStatus();
}

}  // namespace certiq
