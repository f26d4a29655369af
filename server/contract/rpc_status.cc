#include "contract/rpc_status.h"

#include <chrono>
#include <cstdint>
#include <string>

#include "absl/strings/string_view.h"
#include "base/status.h"
#include "google/rpc/error_details.pb.h"

namespace certiq::server {
namespace {

// The message travels three times: percent-encoded in grpc-message, and as
// base64 in the details and in their description: at most 1500 (1 + 2 * 4 / 3) bytes,
// well below 8 KiB with everything else.
constexpr size_t kMaxEncodedMessage = 1500;

// The start of `message` that percent-encodes to at most kMaxEncodedMessage
// bytes and does not end inside a UTF-8 sequence.
std::string Shortened(absl::string_view message) {
  size_t encoded = 0;
  size_t end = 0;  // of the last whole character
  for (size_t i = 0; i < message.size(); ++i) {
    const auto byte = static_cast<unsigned char>(message[i]);
    const bool continues = (byte & 0xc0) == 0x80;
    if (!continues) end = i;
    encoded += byte >= 0x20 && byte <= 0x7e && byte != '%' ? 1 : 3;
    if (encoded > kMaxEncodedMessage) return std::string(message.substr(0, end)) + "...";
  }
  return std::string(message);
}

}  // namespace

google::rpc::Status ToRpcStatus(const absl::Status& status) {
  const std::string message = Shortened(status.message());
  google::rpc::Status details;
  details.set_code(static_cast<int>(status.code()));
  details.set_message(message);
  if (const auto field = base::FieldOf(status); field.has_value()) {
    google::rpc::BadRequest bad_request;
    auto* const violation = bad_request.add_field_violations();
    violation->set_field(*field);
    // The message starts with the field's name, which the violation has already.
    const std::string prefix = *field + ": ";
    violation->set_description(message.rfind(prefix, 0) == 0 ? message.substr(prefix.size())
                                                             : message);
    details.add_details()->PackFrom(bad_request);
  }
  if (const auto precondition = base::PreconditionOf(status); precondition.has_value()) {
    google::rpc::PreconditionFailure failure;
    auto* const violation = failure.add_violations();
    violation->set_type(precondition->type);
    violation->set_subject(Shortened(precondition->subject));
    violation->set_description(message);
    details.add_details()->PackFrom(failure);
  }
  if (const auto delay = base::RetryAfterOf(status); delay.has_value()) {
    google::rpc::RetryInfo retry;
    retry.mutable_retry_delay()->set_seconds(delay->count() / 1000);
    retry.mutable_retry_delay()->set_nanos(static_cast<int32_t>(delay->count() % 1000) * 1'000'000);
    details.add_details()->PackFrom(retry);
  }
  return details;
}

}  // namespace certiq::server
