// Statuses with the details that a server attaches (google.rpc).
#ifndef CERTIQ_CLIENT_CPP_INCLUDE_CERTIQ_STATUS_H_
#define CERTIQ_CLIENT_CPP_INCLUDE_CERTIQ_STATUS_H_

#include <optional>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/strings/string_view.h"
#include "absl/time/time.h"

namespace grpc {
class Status;
}  // namespace grpc

namespace google::rpc {
class Status;
}  // namespace google::rpc

namespace certiq {

// A field of the request that is at fault (google.rpc.BadRequest), such as "spec.bits".
struct FieldViolation {
  std::string field;
  std::string description;
};

// Something that has to change before the call can succeed (google.rpc.PreconditionFailure).
struct PreconditionViolation {
  std::string type;
  std::string subject;
  std::string description;
};

// Everything a status of this library carries beside its code and message.
struct ErrorDetails {
  std::vector<FieldViolation> fields;
  std::vector<PreconditionViolation> preconditions;
  // When the server suggests to try again (google.rpc.RetryInfo); never negative.
  std::optional<absl::Duration> retry_delay;
};

// The one place that turns a gRPC status into an absl::Status: code and message, and every
// google.rpc detail as a payload under its type URL. Details that do not parse are dropped: they
// must not hide the error they came with.
absl::Status FromGrpcStatus(const grpc::Status& status);

// The same for a status within a message, such as why a job failed.
absl::Status FromRpcStatus(const google::rpc::Status& status);

// The details that FromGrpcStatus and FromRpcStatus attached.
ErrorDetails DetailsOf(const absl::Status& status);

// The same status, details included, with `suffix` after its message. OK stays OK.
absl::Status WithSuffix(const absl::Status& status, absl::string_view suffix);

// An error found on this side of the wire that names a field like a server's would.
absl::Status FieldError(absl::StatusCode code, absl::string_view field,
                        absl::string_view description);

}  // namespace certiq

#endif  // CERTIQ_CLIENT_CPP_INCLUDE_CERTIQ_STATUS_H_
