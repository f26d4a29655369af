// Early-return macros for absl::Status and absl::StatusOr.

#ifndef CERTIQ_BASE_STATUS_MACROS_H_
#define CERTIQ_BASE_STATUS_MACROS_H_

#include <utility>

#include "absl/status/status.h"
#include "absl/status/statusor.h"

// Returns the status of `expression` (an absl::Status) from the enclosing function unless it is OK.
#define RETURN_IF_ERROR(expression) \
  CERTIQ_RETURN_IF_ERROR(CERTIQ_UNIQUE_NAME(certiq_status_, __LINE__), expression)
// NOLINTBEGIN(bugprone-macro-parentheses): the argument names a variable.
#define CERTIQ_RETURN_IF_ERROR(status, expression)                       \
  do {                                                                   \
    if (absl::Status status = (expression); !status.ok()) return status; \
  } while (false)
// NOLINTEND(bugprone-macro-parentheses)

// Assigns the value of `expression` (an absl::StatusOr) to `lhs`, which may declare a variable, or
// returns its status: ASSIGN_OR_RETURN(const auto rows, RowsIn(...)). It expands to several
// statements, so the body of an if needs braces around it.
#define ASSIGN_OR_RETURN(lhs, expression) \
  CERTIQ_ASSIGN_OR_RETURN(CERTIQ_UNIQUE_NAME(certiq_value_, __LINE__), lhs, expression)
// NOLINTBEGIN(bugprone-macro-parentheses): the arguments name variables and declare them.
#define CERTIQ_ASSIGN_OR_RETURN(value, lhs, expression) \
  auto value = (expression);                            \
  if (!value.ok()) return std::move(value).status();    \
  lhs = *std::move(value)
// NOLINTEND(bugprone-macro-parentheses)
#define CERTIQ_UNIQUE_NAME(prefix, line) CERTIQ_UNIQUE_NAME_INNER(prefix, line)
#define CERTIQ_UNIQUE_NAME_INNER(prefix, line) prefix##line

#endif  // CERTIQ_BASE_STATUS_MACROS_H_
