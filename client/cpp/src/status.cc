#include "certiq/status.h"

#include <algorithm>
#include <string>

#include "absl/strings/cord.h"
#include "absl/strings/str_cat.h"
#include "absl/types/optional.h"
#include "google/rpc/error_details.pb.h"
#include "google/rpc/status.pb.h"
#include "grpcpp/support/status.h"

namespace certiq {
namespace {

template <typename Message>
std::string TypeUrl() {
  return absl::StrCat("type.googleapis.com/", Message::descriptor()->full_name());
}

// False where there is no such detail or it does not parse.
template <typename Message>
bool ReadDetail(const absl::Status& status, Message* detail) {
  const absl::optional<absl::Cord> payload = status.GetPayload(TypeUrl<Message>());
  return payload.has_value() && detail->ParseFromString(std::string(*payload));
}

}  // namespace

absl::Status FromRpcStatus(const google::rpc::Status& status) {
  if (status.code() == 0) return absl::OkStatus();
  const auto code = static_cast<absl::StatusCode>(status.code());
  // A code of a newer gRPC becomes UNKNOWN; it must never become OK.
  const bool known = absl::StatusCodeToString(code)[0] != '\0';
  absl::Status result(known ? code : absl::StatusCode::kUnknown, status.message());
  for (const auto& detail : status.details()) {
    // Several details of a type concatenate: that is how protobuf merges messages.
    absl::Cord payload = result.GetPayload(detail.type_url()).value_or(absl::Cord());
    payload.Append(detail.value());
    result.SetPayload(detail.type_url(), payload);
  }
  return result;
}

absl::Status FromGrpcStatus(const grpc::Status& status) {
  google::rpc::Status rpc;
  if (!rpc.ParseFromString(status.error_details())) rpc.Clear();
  // Code and message of the transport override those in the details.
  rpc.set_code(status.error_code());
  rpc.set_message(status.error_message());
  return FromRpcStatus(rpc);
}

ErrorDetails DetailsOf(const absl::Status& status) {
  ErrorDetails details;
  google::rpc::BadRequest bad_request;
  if (ReadDetail(status, &bad_request)) {
    for (const auto& violation : bad_request.field_violations()) {
      details.fields.push_back({violation.field(), violation.description()});
    }
  }
  google::rpc::PreconditionFailure precondition;
  if (ReadDetail(status, &precondition)) {
    for (const auto& violation : precondition.violations()) {
      details.preconditions.push_back(
          {violation.type(), violation.subject(), violation.description()});
    }
  }
  google::rpc::RetryInfo retry;
  if (ReadDetail(status, &retry)) {
    const absl::Duration delay = absl::Seconds(retry.retry_delay().seconds()) +
                                 absl::Nanoseconds(retry.retry_delay().nanos());
    details.retry_delay = std::max(delay, absl::ZeroDuration());
  }
  return details;
}

absl::Status WithSuffix(const absl::Status& status, absl::string_view suffix) {
  if (status.ok()) return status;
  absl::Status result(status.code(), absl::StrCat(status.message(), suffix));
  status.ForEachPayload([&result](absl::string_view type_url, const absl::Cord& payload) {
    result.SetPayload(type_url, payload);
  });
  return result;
}

absl::Status FieldError(absl::StatusCode code, absl::string_view field,
                        absl::string_view description) {
  google::rpc::BadRequest bad_request;
  auto* const violation = bad_request.add_field_violations();
  violation->set_field(std::string(field));
  violation->set_description(std::string(description));
  absl::Status status(code, absl::StrCat(field, ": ", description));
  status.SetPayload(TypeUrl<google::rpc::BadRequest>(),
                    absl::Cord(bad_request.SerializeAsString()));
  return status;
}

}  // namespace certiq
