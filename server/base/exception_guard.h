// Exception barrier: calls that may throw, on threads that no exception may leave.

#ifndef CERTIQ_BASE_EXCEPTION_GUARD_H_
#define CERTIQ_BASE_EXCEPTION_GUARD_H_

#include <exception>
#include <new>
#include <utility>

#include "absl/status/status.h"
#include "absl/strings/str_cat.h"
#include "base/status.h"

namespace certiq::base {

// The server reports errors as absl::Status and throws nothing itself, but the standard library
// does: std::bad_alloc where a client's layer does not fit. An exception that leaves a worker or a
// thread of gRPC's ends the process, or leaves a call without an end. Work on workers and in gRPC's
// callbacks therefore runs through RunGuarded, and its completion through Complete.

// The status that `run()` returns. An exception becomes a status: std::bad_alloc is
// RESOURCE_EXHAUSTED with a retry delay, since other layers may give memory back; anything else is
// INTERNAL, a defect.
template <typename Run>
absl::Status RunGuarded(const Run& run) {
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

// Calls `done(status)`, the completion of work that has run. An exception is dropped: the work is
// over and there is nobody else to report to.
template <typename Done>
void Complete(const Done& done, absl::Status status) {
  try {
    done(std::move(status));
  } catch (...) {  // NOLINT(bugprone-empty-catch): see above.
  }
}

}  // namespace certiq::base

#endif  // CERTIQ_BASE_EXCEPTION_GUARD_H_
