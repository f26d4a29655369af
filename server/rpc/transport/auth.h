// Bearer-token authentication and scopes.

#ifndef CERTIQ_RPC_TRANSPORT_AUTH_H_
#define CERTIQ_RPC_TRANSPORT_AUTH_H_

#include <grpcpp/server_context.h>

#include <chrono>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "base/mutex.h"
#include "base/sha256.h"
#include "rpc/transport/file.h"
#include "rpc/transport/token_file.h"
#include "runtime/tenant.h"

namespace certiq::server {

// Calls that change nothing need kRead, all others kWrite.
enum class Scope { kRead, kWrite };

// Who makes a call.
struct Caller {
  Tenant tenant;
  Scope scope = Scope::kRead;
  // The SHA-256 of the token; none where calls need no token.
  std::optional<base::Sha256Digest> token;
};

// Holds the bearer tokens of a file (token_file.h), as digests only. Thread-safe.
//
// A call checks the file's stamp if the last check is a second old, so no thread of its own is
// needed: a token that was removed is refused a second later at most, and symlinks that are
// swapped, as Kubernetes does, are followed. A file that is missing or malformed leaves the tokens
// as they were, with one warning.
class Authenticator {
 public:
  // Authentication is off: every call is of the tenant "".
  Authenticator() = default;
  // INVALID_ARGUMENT that names the file, the line and what was expected, never a token.
  static absl::StatusOr<std::unique_ptr<Authenticator>> Open(
      std::string token_file, Warn warn,
      std::chrono::milliseconds check_interval = std::chrono::seconds(1));

  Authenticator(const Authenticator&) = delete;
  Authenticator& operator=(const Authenticator&) = delete;

  // False if calls need no token.
  bool enabled() const { return !token_file_.empty(); }

  // Who has the token in the call's metadata "authorization: Bearer TOKEN". UNAUTHENTICATED
  // if that is missing, repeated or malformed, or its token unknown; PERMISSION_DENIED if the token
  // lacks `scope`.
  absl::StatusOr<Caller> Authenticate(const grpc::CallbackServerContext& context, Scope scope)
      ABSL_LOCKS_EXCLUDED(mu_);
  // The same for the values of the metadata key "authorization".
  absl::StatusOr<Caller> Authenticate(const std::vector<absl::string_view>& values, Scope scope)
      ABSL_LOCKS_EXCLUDED(mu_);
  // OK while the caller's token is still that tenant's and has the scope, else UNAUTHENTICATED.
  absl::Status Recheck(const Caller& caller) ABSL_LOCKS_EXCLUDED(mu_);

 private:
  using Clock = std::chrono::steady_clock;
  using Tokens = std::vector<TokenEntry>;

  Authenticator(std::string token_file, Warn warn, std::chrono::milliseconds check_interval);
  absl::StatusOr<std::shared_ptr<const Tokens>> Load() const;
  // The entry of a token; null where there is none.
  static const TokenEntry* Find(const Tokens& tokens, const base::Sha256Digest& digest);
  // The tokens of the file as it is now, or as it was when it last could be read.
  std::shared_ptr<const Tokens> Current() ABSL_LOCKS_EXCLUDED(mu_);

  const std::string token_file_;
  const Warn warn_;
  const std::chrono::milliseconds check_interval_{0};

  base::Mutex mu_;
  Clock::time_point checked_at_ ABSL_GUARDED_BY(mu_);
  // The stamp of the file that was read last, whether or not its tokens are in use.
  std::optional<FileStamp> stamp_ ABSL_GUARDED_BY(mu_);
  std::shared_ptr<const Tokens> tokens_ ABSL_GUARDED_BY(mu_);
};

}  // namespace certiq::server

#endif  // CERTIQ_RPC_TRANSPORT_AUTH_H_
