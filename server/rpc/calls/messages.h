// Messages as byte buffers.

#ifndef CERTIQ_RPC_CALLS_MESSAGES_H_
#define CERTIQ_RPC_CALLS_MESSAGES_H_

#include <grpcpp/impl/codegen/proto_utils.h>
#include <grpcpp/support/byte_buffer.h>
#include <grpcpp/support/proto_buffer_reader.h>

#include <cstddef>
#include <cstdint>
#include <span>
#include <string>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/str_cat.h"
#include "base/status.h"
#include "base/status_macros.h"
#include "contract/check_message.h"

namespace certiq::server {

using Bytes = grpc::ByteBuffer;

// INVALID_ARGUMENT where the bytes are no such message, or one that no message of a client may be
// (check_message.h); `name` says what was expected: "a QuantizeRequest".
template <typename Message>
absl::StatusOr<Message> Parse(const Bytes& buffer, const char* name) {
  Bytes copy = buffer;  // of references; the reader wants one it may change
  grpc::ProtoBufferReader reader(&copy);
  Message message;
  if (reader.status().ok() && message.ParseFromZeroCopyStream(&reader)) {
    RETURN_IF_ERROR(CheckMessage(message));
    return message;
  }
  return base::InvalidField("payload", absl::StrCat("expected ", name, ", got ", buffer.Length(),
                                                    " bytes that do not parse as one"));
}

template <typename Message>
absl::Status Serialize(const Message& message, Bytes* buffer) {
  bool own = false;  // the buffer; always so
  if (grpc::SerializationTraits<Message>::Serialize(message, buffer, &own).ok()) {
    return absl::OkStatus();
  }
  return absl::InternalError("a response could not be serialized");
}

inline std::span<const std::byte> AsBytes(const std::string& data) {
  return std::as_bytes(std::span(data.data(), data.size()));
}

// INVALID_ARGUMENT about a stream that does not begin with its header; `got` says with what:
// "weight", "none".
inline absl::Status HeaderExpected(absl::string_view got) {
  return base::InvalidField("header", absl::StrCat("expected as the first message, got ", got));
}
// The same where the stream ended before.
inline absl::Status HeaderMissing() {
  return base::InvalidField("header",
                            "expected as the first message, the stream ended without one");
}
// INVALID_ARGUMENT about a message that is none of those that follow the header.
inline absl::Status HeaderMisplaced() {
  return base::InvalidField("header", "expected as the first message, and only there");
}

}  // namespace certiq::server

#endif  // CERTIQ_RPC_CALLS_MESSAGES_H_
