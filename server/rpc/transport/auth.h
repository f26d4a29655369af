// Who calls, and what they may do.

#ifndef CERTIQ_RPC_TRANSPORT_AUTH_H_
#define CERTIQ_RPC_TRANSPORT_AUTH_H_

#include <grpcpp/server_context.h>

#include <chrono>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "rpc/transport/file.h"
#include "rpc/transport/token_file.h"
#include "runtime/tenant.h"

namespace certiq::server {

// Calls that change nothing need kRead, all others kWrite.
enum class Scope { kRead, kWrite };

// Knows the bearer tokens of a file (see token_file.h), as digests only. Thread-safe.
//
// The file is looked at again while calls come, at most once a second: a token that was taken out
// is refused a second later at most, and symlinks that are swapped, as Kubernetes does, are
// followed. A file that is gone or wrong changes nothing and is warned about once.
class Authenticator {
 public:
  // Lets everyone in, as the tenant "".
  Authenticator() = default;
  // INVALID_ARGUMENT naming file, line and what was expected, never a token.
  static absl::StatusOr<std::unique_ptr<Authenticator>> Open(
      std::string token_file, Warn warn,
      std::chrono::milliseconds look_every = std::chrono::seconds(1));

  Authenticator(const Authenticator&) = delete;
  Authenticator& operator=(const Authenticator&) = delete;

  // False where everyone is let in.
  bool enabled() const { return !token_file_.empty(); }

  // By the call's metadata "authorization: Bearer TOKEN". UNAUTHENTICATED where that is missing,
  // there more than once, malformed, or its token unknown; PERMISSION_DENIED where the token is
  // not for `scope`.
  absl::StatusOr<Tenant> Authenticate(const grpc::CallbackServerContext& context, Scope scope);
  // The same, by the values that the metadata "authorization" has.
  absl::StatusOr<Tenant> Authenticate(const std::vector<absl::string_view>& values, Scope scope);

 private:
  using Clock = std::chrono::steady_clock;
  using Tokens = std::vector<TokenEntry>;

  Authenticator(std::string token_file, Warn warn, std::chrono::milliseconds look_every);
  absl::StatusOr<std::shared_ptr<const Tokens>> Load() const;
  std::shared_ptr<const Tokens> Current();

  const std::string token_file_;
  const Warn warn_;
  const std::chrono::milliseconds look_every_{0};

  std::mutex mu_;
  // All guarded by mu_. The stamp is that of the file last tried, whether or not it served.
  Clock::time_point looked_at_;
  std::optional<FileStamp> stamp_;
  std::shared_ptr<const Tokens> tokens_;
};

}  // namespace certiq::server

#endif  // CERTIQ_RPC_TRANSPORT_AUTH_H_
