#include "rpc/transport/token_file.h"

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <map>
#include <string>
#include <utility>

#include "absl/status/status.h"
#include "absl/strings/ascii.h"
#include "absl/strings/escaping.h"
#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_split.h"
#include "absl/strings/strip.h"
#include "base/sha256.h"
#include "base/status_macros.h"

namespace certiq::server {
namespace {

constexpr size_t kMinTokenBytes = 16;
constexpr size_t kMaxTenantBytes = 64;
constexpr char kHashed[] = "sha256:";

absl::Status Expected(size_t line, absl::string_view what) {
  return absl::InvalidArgumentError(absl::StrCat("line ", line, ": expected ", what));
}

bool AllOf(absl::string_view text, bool (*is)(unsigned char)) {
  return std::all_of(text.begin(), text.end(),
                     [is](char c) { return is(static_cast<unsigned char>(c)); });
}

absl::StatusOr<base::Sha256Digest> ReadToken(size_t line, absl::string_view field) {
  if (absl::ConsumePrefix(&field, kHashed)) {
    base::Sha256Digest digest;
    if (field.size() != 2 * digest.size() || !AllOf(field, absl::ascii_isxdigit)) {
      return Expected(line, "64 hex digits after sha256:");
    }
    const std::string bytes = absl::HexStringToBytes(field);
    std::copy(bytes.begin(), bytes.end(), digest.begin());
    return digest;
  }
  if (field.size() < kMinTokenBytes || !AllOf(field, absl::ascii_isgraph)) {
    return Expected(line, absl::StrCat("a token of at least ", kMinTokenBytes,
                                       " printable ASCII characters, or sha256:HEX of one"));
  }
  const std::optional<base::Sha256Digest> digest = base::Sha256Of(field);
  if (!digest.has_value()) return absl::InternalError("SHA-256 is not available");
  return *digest;
}

bool ReadScopes(absl::string_view field, TokenEntry& entry) {
  for (const absl::string_view scope : absl::StrSplit(field, ',')) {
    bool& flag = scope == "read" ? entry.read : entry.write;
    if ((scope != "read" && scope != "write") || flag) return false;
    flag = true;
  }
  return true;
}

bool ReadLimit(absl::string_view field, TenantLimits& limits) {
  const std::pair<absl::string_view, absl::string_view> parts =
      absl::StrSplit(field, absl::MaxSplits('=', 1));
  const std::pair<absl::string_view, int64_t*> known[] = {{"memory_bytes", &limits.memory_bytes},
                                                          {"disk_bytes", &limits.disk_bytes},
                                                          {"jobs", &limits.jobs},
                                                          {"streams", &limits.streams}};
  for (const auto& [name, limit] : known) {
    if (parts.first != name) continue;
    // A limit is given once. SimpleAtoi alone would also accept blanks and signs.
    return *limit == kNoLimit && AllOf(parts.second, absl::ascii_isdigit) &&
           absl::SimpleAtoi(parts.second, limit);
  }
  return false;
}

absl::StatusOr<TokenEntry> ReadEntry(size_t line, const std::vector<absl::string_view>& fields) {
  if (fields.size() < 3) return Expected(line, "TOKEN TENANT SCOPES [LIMIT=VALUE ...]");
  TokenEntry entry;
  ASSIGN_OR_RETURN(entry.digest, ReadToken(line, fields[0]));
  const absl::string_view tenant = fields[1];
  if (tenant.size() > kMaxTenantBytes || !AllOf(tenant, [](unsigned char c) {
        return absl::ascii_isalnum(c) || c == '.' || c == '_' || c == '-';
      })) {
    return Expected(line,
                    "as the second field a tenant of 1 to 64 characters, each a letter, digit, "
                    "'.', '_' or '-'");
  }
  entry.tenant.name = std::string(tenant);
  if (!ReadScopes(fields[2], entry)) {
    return Expected(line, "as the third field scopes: read, write or read,write");
  }
  for (size_t i = 3; i < fields.size() && fields[i].front() != '#'; ++i) {
    if (!ReadLimit(fields[i], entry.tenant.limits)) {
      return Expected(line, absl::StrCat("in field ", i + 1,
                                         " memory_bytes=, disk_bytes=, jobs= or streams= with an "
                                         "integer of at least 0, each at most once"));
    }
  }
  return entry;
}

}  // namespace

absl::StatusOr<std::vector<TokenEntry>> ParseTokens(absl::string_view text) {
  std::vector<TokenEntry> entries;
  std::map<base::Sha256Digest, size_t> line_of_token;
  // The line of a tenant's first token, and its limits there.
  std::map<std::string, std::pair<size_t, TenantLimits>> tenants;
  size_t line = 0;
  for (const absl::string_view content : absl::StrSplit(text, '\n')) {
    ++line;
    const std::vector<absl::string_view> fields =
        absl::StrSplit(content, absl::ByAnyChar(" \t\r"), absl::SkipEmpty());
    if (fields.empty() || fields[0].front() == '#') continue;
    ASSIGN_OR_RETURN(TokenEntry entry, ReadEntry(line, fields));
    const auto [other, is_new] = line_of_token.emplace(entry.digest, line);
    if (!is_new) return Expected(line, absl::StrCat("another token than in line ", other->second));
    const auto [first, is_first] =
        tenants.try_emplace(entry.tenant.name, line, entry.tenant.limits);
    if (!is_first && first->second.second != entry.tenant.limits) {
      return Expected(
          line, absl::StrCat("the limits that this tenant has in line ", first->second.first));
    }
    entries.push_back(std::move(entry));
  }
  // A file without tokens is more likely one that is being written.
  if (entries.empty()) return absl::InvalidArgumentError("expected at least one token");
  return entries;
}

}  // namespace certiq::server
