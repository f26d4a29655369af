// Checks that hold for every message of a client, whatever its type.

#ifndef CERTIQ_CONTRACT_CHECK_MESSAGE_H_
#define CERTIQ_CONTRACT_CHECK_MESSAGE_H_

#include <google/protobuf/message.h>

#include <cstddef>

#include "absl/status/status.h"

namespace certiq::server {

// No text of a client is longer. Names, labels and ids have closer limits of their own.
inline constexpr size_t kMaxTextBytes = 1024;

// INVALID_ARGUMENT with the field's path where a text is longer than kMaxTextBytes, or where a
// field has a number that this server does not know: its client relies on something that would not
// happen.
absl::Status CheckMessage(const google::protobuf::Message& message);

}  // namespace certiq::server

#endif  // CERTIQ_CONTRACT_CHECK_MESSAGE_H_
