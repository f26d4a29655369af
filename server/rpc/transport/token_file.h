// Token file: bearer tokens with their tenants, scopes and limits.

#ifndef CERTIQ_RPC_TRANSPORT_TOKEN_FILE_H_
#define CERTIQ_RPC_TRANSPORT_TOKEN_FILE_H_

#include <vector>

#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "base/sha256.h"
#include "runtime/tenant.h"

namespace certiq::server {

struct TokenEntry {
  // SHA-256 of the token, which itself is not kept.
  base::Sha256Digest digest = {};
  Tenant tenant;
  bool read = false;
  bool write = false;
};

// One entry a line, fields separated by blanks; "#" at the start of a line or after SCOPES begins a
// comment:
//   TOKEN TENANT SCOPES [LIMIT=VALUE ...]
// TOKEN is at least 16 printable ASCII characters or sha256: with the 64 hex digits of one, TENANT
// 1 to 64 characters of [A-Za-z0-9._-], SCOPES "read", "write" or "read,write", LIMIT
// "memory_bytes", "disk_bytes", "jobs" or "streams". Tokens are distinct; a tenant may have
// several, with the same limits. INVALID_ARGUMENT names the line and what was expected. It repeats
// nothing of the line: in a malformed line any field may be the token.
absl::StatusOr<std::vector<TokenEntry>> ParseTokens(absl::string_view text);

}  // namespace certiq::server

#endif  // CERTIQ_RPC_TRANSPORT_TOKEN_FILE_H_
