#include "rpc/transport/auth.h"

#include <openssl/crypto.h>

#include <utility>

#include "absl/status/status.h"
#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/strip.h"
#include "base/sha256.h"
#include "base/status_macros.h"

namespace certiq::server {
namespace {

constexpr char kHeader[] = "authorization";
constexpr absl::string_view kScheme = "bearer ";

// UNAUTHENTICATED. The text names the kind of problem and repeats nothing of what was sent.
absl::Status NoToken(absl::string_view problem) {
  return absl::UnauthenticatedError(absl::StrCat(
      "expected the metadata \"authorization: Bearer TOKEN\", once, with a token that this server "
      "knows; ",
      problem));
}

bool Has(const TokenEntry& entry, Scope scope) {
  return scope == Scope::kRead ? entry.read : entry.write;
}

}  // namespace

Authenticator::Authenticator(std::string token_file, Warn warn,
                             std::chrono::milliseconds check_interval)
    : token_file_(std::move(token_file)), warn_(std::move(warn)), check_interval_(check_interval) {}

absl::StatusOr<std::unique_ptr<Authenticator>> Authenticator::Open(
    std::string token_file, Warn warn, std::chrono::milliseconds check_interval) {
  std::unique_ptr<Authenticator> authenticator(
      new Authenticator(std::move(token_file), std::move(warn), check_interval));
  {
    const base::MutexLock lock(authenticator->mu_);
    // Taken before the file is read, so that the next check sees a change made meanwhile.
    authenticator->stamp_ = StampOf(authenticator->token_file_);
    authenticator->checked_at_ = Clock::now();
    ASSIGN_OR_RETURN(authenticator->tokens_, authenticator->Load());
  }
  return authenticator;
}

absl::StatusOr<std::shared_ptr<const Authenticator::Tokens>> Authenticator::Load() const {
  const auto wrong = [this](const absl::Status& status) {
    return absl::InvalidArgumentError(
        absl::StrCat("--token_file: ", token_file_, ": ", status.message()));
  };
  const absl::StatusOr<std::string> text = ReadSmallFile(token_file_);
  if (!text.ok()) return wrong(text.status());
  absl::StatusOr<Tokens> tokens = ParseTokens(*text);
  if (!tokens.ok()) return wrong(tokens.status());
  if (warn_ && OpenToOthers(token_file_)) {
    warn_(absl::StrCat("--token_file: ", token_file_,
                       ": every user of this machine may read or write it; chmod o-rwx"));
  }
  return std::make_shared<const Tokens>(*std::move(tokens));
}

std::shared_ptr<const Authenticator::Tokens> Authenticator::Current() {
  const base::MutexLock lock(mu_);
  const Clock::time_point now = Clock::now();
  if (now - checked_at_ < check_interval_) return tokens_;
  checked_at_ = now;
  const std::optional<FileStamp> stamp = StampOf(token_file_);
  if (stamp == stamp_) return tokens_;
  stamp_ = stamp;
  absl::StatusOr<std::shared_ptr<const Tokens>> tokens = Load();
  if (tokens.ok()) {
    tokens_ = *std::move(tokens);
  } else if (warn_) {
    warn_(absl::StrCat(tokens.status().message(), "; the tokens read before stay valid"));
  }
  return tokens_;
}

absl::StatusOr<Caller> Authenticator::Authenticate(const grpc::CallbackServerContext& context,
                                                   Scope scope) {
  const auto [first, last] = context.client_metadata().equal_range(kHeader);
  std::vector<absl::string_view> values;
  for (auto entry = first; entry != last; ++entry) {
    values.emplace_back(entry->second.data(), entry->second.size());
  }
  return Authenticate(values, scope);
}

absl::StatusOr<Caller> Authenticator::Authenticate(const std::vector<absl::string_view>& values,
                                                   Scope scope) {
  if (!enabled()) return Caller{.tenant = {}, .scope = scope, .token = std::nullopt};
  if (values.empty()) return NoToken("there was none");
  if (values.size() > 1) return NoToken("there were several");
  absl::string_view token = values[0];
  if (!absl::StartsWithIgnoreCase(token, kScheme)) return NoToken("it had another form");
  token.remove_prefix(kScheme.size());
  while (absl::ConsumePrefix(&token, " ")) {
  }
  const std::optional<base::Sha256Digest> digest = base::Sha256Of(token);
  if (!digest.has_value()) return absl::InternalError("SHA-256 is not available");

  const std::shared_ptr<const Tokens> tokens = Current();
  const TokenEntry* const found = Find(*tokens, *digest);
  if (found == nullptr) return NoToken("its token was another");
  if (!Has(*found, scope)) {
    return absl::PermissionDeniedError(absl::StrCat(
        "this token is not for the scope \"", scope == Scope::kRead ? "read" : "write", "\""));
  }
  return Caller{.tenant = found->tenant, .scope = scope, .token = digest};
}

absl::Status Authenticator::Recheck(const Caller& caller) {
  if (!caller.token.has_value()) return absl::OkStatus();
  const std::shared_ptr<const Tokens> tokens = Current();
  const TokenEntry* const found = Find(*tokens, *caller.token);
  if (found != nullptr && found->tenant.name == caller.tenant.name && Has(*found, caller.scope)) {
    return absl::OkStatus();
  }
  return absl::UnauthenticatedError("the token of this call was revoked");
}

const TokenEntry* Authenticator::Find(const Tokens& tokens, const base::Sha256Digest& digest) {
  // Every digest is compared, in constant time: the time taken says nothing about a close one.
  const TokenEntry* found = nullptr;
  for (const TokenEntry& entry : tokens) {
    if (CRYPTO_memcmp(entry.digest.data(), digest.data(), digest.size()) == 0) found = &entry;
  }
  return found;
}

}  // namespace certiq::server
