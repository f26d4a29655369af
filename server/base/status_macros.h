// Early returns for absl::Status and absl::StatusOr.

#ifndef CERTIQ_BASE_STATUS_MACROS_H_
#define CERTIQ_BASE_STATUS_MACROS_H_

#include <utility>

#include "absl/status/status.h"
#include "absl/status/statusor.h"

// Returns the status of `expression` (a Status) from the enclosing function unless it is OK.
#define RETURN_IF_ERROR(expression)                                                           \
  do {                                                                                        \
    if (absl::Status certiq_status = (expression); !certiq_status.ok()) return certiq_status; \
  } while (false)

// Assigns the value of `expression` (a StatusOr) to `lhs`, which may declare a variable, or returns
// its status: ASSIGN_OR_RETURN(const auto rows, RowsIn(...)). It is two statements, so it does not
// stand alone in an if.
#define ASSIGN_OR_RETURN(lhs, expression) \
  CERTIQ_ASSIGN_OR_RETURN(CERTIQ_UNIQUE_NAME(certiq_value_, __LINE__), lhs, expression)
#define CERTIQ_ASSIGN_OR_RETURN(value, lhs, expression) \
  auto value = (expression);                            \
  if (!value.ok()) return std::move(value).status();    \
  lhs = *std::move(value)
#define CERTIQ_UNIQUE_NAME(prefix, line) CERTIQ_UNIQUE_NAME_INNER(prefix, line)
#define CERTIQ_UNIQUE_NAME_INNER(prefix, line) prefix##line

#endif  // CERTIQ_BASE_STATUS_MACROS_H_
