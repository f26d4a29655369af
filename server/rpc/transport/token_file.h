// The file of tokens: who is let in, for what, with which limits.

#ifndef CERTIQ_RPC_TRANSPORT_TOKEN_FILE_H_
#define CERTIQ_RPC_TRANSPORT_TOKEN_FILE_H_

#include <array>
#include <optional>
#include <vector>

#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "runtime/tenant.h"

namespace certiq::server {

using TokenDigest = std::array<unsigned char, 32>;

// SHA-256; nothing where the library fails.
std::optional<TokenDigest> DigestOf(absl::string_view token);

// The token itself is not kept.
struct TokenEntry {
  TokenDigest digest = {};
  Tenant tenant;
  bool read = false;
  bool write = false;
};

// One entry a line, fields apart by blanks; "#" at the start of a line or after SCOPES begins a
// comment:
//   TOKEN TENANT SCOPES [LIMIT=VALUE ...]
// TOKEN is at least 16 printable ASCII characters or sha256: with the 64 hex digits of one, TENANT
// 1 to 64 characters of [A-Za-z0-9._-], SCOPES "read", "write" or "read,write", LIMIT
// "memory_bytes", "disk_bytes", "jobs" or "streams". Tokens are different; a tenant may have
// several, with the same limits. Errors name line and expectation and repeat nothing of the line:
// in a line that is wrong, any field may be the token.
absl::StatusOr<std::vector<TokenEntry>> ParseTokens(absl::string_view text);

}  // namespace certiq::server

#endif  // CERTIQ_RPC_TRANSPORT_TOKEN_FILE_H_
