#include "errors.h"

#include "absl/strings/ascii.h"
#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "certiq/status.h"
#include "quantize_flags.h"

namespace certiq::cli {

std::string Printable(absl::string_view text) {
  std::string result(text);
  for (char& c : result) {
    if (absl::ascii_iscntrl(static_cast<unsigned char>(c))) c = ' ';
  }
  return result;
}

void PrintError(const absl::Status& status, absl::string_view advice, std::ostream& err) {
  err << "certiq: " << absl::StatusCodeToString(status.code()) << ": "
      << Printable(status.message()) << "\n";
  const ErrorDetails details = DetailsOf(status);
  for (const FieldViolation& violation : details.fields) {
    const std::string flag = FlagForField(violation.field);
    err << "  field " << Printable(violation.field);
    if (!flag.empty()) err << " (" << flag << ")";
    // Most messages are made from their fields; once is enough.
    if (!absl::StrContains(status.message(), violation.description)) {
      err << ": " << Printable(violation.description);
    }
    err << "\n";
  }
  for (const PreconditionViolation& violation : details.preconditions) {
    err << "  " << Printable(violation.type) << " " << Printable(violation.subject) << ": "
        << Printable(violation.description) << "\n";
  }
  if (!advice.empty()) err << "  advice: " << advice << "\n";
}

std::string AdviceFor(const absl::Status& status, const std::string& server,
                      const std::string& request_id) {
  const ErrorDetails details = DetailsOf(status);
  switch (status.code()) {
    case absl::StatusCode::kInvalidArgument:
      return "correct the value and run again";
    case absl::StatusCode::kUnimplemented:
      return details.fields.empty() ? absl::StrCat("is ", server, " a certiq server, and recent?")
                                    : "this server does not offer that value; choose another";
    case absl::StatusCode::kNotFound:
      return "check the name; `certiq calibrations list` shows those of the server";
    case absl::StatusCode::kFailedPrecondition:
      return "raise --damping (relative_trace:0.1), or accept plain rounding with --on_failure "
             "nearest";
    case absl::StatusCode::kResourceExhausted:
      if (!details.retry_delay.has_value()) return "send less at once";
      return absl::StrFormat("the server is busy; try again in %.0f s or more",
                             absl::ToDoubleSeconds(*details.retry_delay));
    case absl::StatusCode::kUnavailable:
      return absl::StrCat("is a server listening on ", server,
                          ", and does it speak TLS if and only if this command does? If it "
                          "restarts, try again shortly");
    case absl::StatusCode::kUnauthenticated:
      return "give --token_file, or CERTIQ_TOKEN, with a token that this server knows";
    case absl::StatusCode::kPermissionDenied:
      return "ask whoever runs the server for a token that allows it";
    case absl::StatusCode::kDataLoss:
    case absl::StatusCode::kInternal:
    case absl::StatusCode::kUnknown:
      return absl::StrCat(
          "nothing was written; please report it with the server's log for request ", request_id);
    case absl::StatusCode::kCancelled:
    case absl::StatusCode::kAborted:
    case absl::StatusCode::kDeadlineExceeded:
      return "nothing was written; run again";
    default:
      return "";
  }
}

std::string GeneralAdvice(const absl::Status& status, const std::string& server) {
  switch (status.code()) {
    case absl::StatusCode::kNotFound:
      return "`certiq calibrations list` and `certiq jobs list` show what the server has";
    case absl::StatusCode::kFailedPrecondition:
      // What has to change is in the message: it depends on the verb.
      return "";
    case absl::StatusCode::kAborted:
      return "another process writes this stream; let one of them do it";
    case absl::StatusCode::kAlreadyExists:
      return "choose another --request_id, or send what the first request sent";
    case absl::StatusCode::kCancelled:
    case absl::StatusCode::kDeadlineExceeded:
      return "run again; what the server has received is not lost";
    case absl::StatusCode::kDataLoss:
    case absl::StatusCode::kInternal:
    case absl::StatusCode::kUnknown:
      return "please report it with the server's log";
    default:
      return AdviceFor(status, server, "");
  }
}

}  // namespace certiq::cli
