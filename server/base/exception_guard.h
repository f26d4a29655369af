// Work that may throw, run where nothing may leave.

#ifndef CERTIQ_BASE_EXCEPTION_GUARD_H_
#define CERTIQ_BASE_EXCEPTION_GUARD_H_

#include <exception>
#include <functional>
#include <new>
#include <utility>

#include "absl/status/status.h"
#include "absl/strings/str_cat.h"
#include "base/status.h"

namespace certiq::base {

// What `run` returns. What it throws becomes a status: std::bad_alloc RESOURCE_EXHAUSTED, anything
// else INTERNAL.
inline absl::Status RunGuarded(const std::function<absl::Status()>& run) {
  try {
    return run();
  } catch (const std::bad_alloc&) {
    absl::Status status = absl::ResourceExhaustedError("the server ran out of memory");
    SetRetryAfter(status, kRetrySoon);
    return status;
  } catch (const std::exception& error) {
    return absl::InternalError(absl::StrCat("unexpected exception: ", error.what()));
  } catch (...) {
    return absl::InternalError("unexpected exception");
  }
}

// Calls `done` with `status`; what it throws is lost.
inline void Complete(const std::function<void(absl::Status)>& done, absl::Status status) {
  try {
    done(std::move(status));
  } catch (...) {  // NOLINT(bugprone-empty-catch): a completion has nobody left to tell.
  }
}

}  // namespace certiq::base

#endif  // CERTIQ_BASE_EXCEPTION_GUARD_H_
