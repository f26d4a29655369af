#include "rpc/transport/token_file.h"

#include <gtest/gtest.h>

#include <string>
#include <utility>
#include <vector>

#include "absl/strings/escaping.h"
#include "absl/strings/str_cat.h"
#include "support/text.h"

namespace certiq::testing {
namespace {

using server::ParseTokens;

constexpr char kToken[] = "0123456789-secret";
constexpr char kOther[] = "another-secret!#%";

std::string HexOf(const std::string& token) {
  const auto digest = base::Sha256Of(token);
  return absl::BytesToHexString(std::string(digest->begin(), digest->end()));
}

TEST(TokenFileTest, DigestIsSha256) {
  EXPECT_EQ(HexOf("abc"), "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad");
}

TEST(TokenFileTest, ReadsEntries) {
  const auto entries = ParseTokens(absl::StrCat(
      "# who is let in\n\n  \t\n", kToken, "  alice\tread,write memory_bytes=5 jobs=0 # note\r\n",
      "sha256:", absl::AsciiStrToUpper(HexOf(kOther)), " Bob.b_b-1 read\n",
      "third-secret-token alice write jobs=0 memory_bytes=5"));
  ASSERT_TRUE(entries.ok()) << entries.status();
  ASSERT_EQ(entries->size(), 3U);
  const server::TokenEntry& first = entries->at(0);
  EXPECT_EQ(first.digest, base::Sha256Of(kToken));
  EXPECT_EQ(first.tenant.name, "alice");
  EXPECT_TRUE(first.read && first.write);
  EXPECT_EQ(first.tenant.limits, (server::TenantLimits{.memory_bytes = 5, .jobs = 0}));
  const server::TokenEntry& second = entries->at(1);
  EXPECT_EQ(second.digest, base::Sha256Of(kOther));
  EXPECT_EQ(second.tenant.name, "Bob.b_b-1");
  EXPECT_TRUE(second.read && !second.write);
  EXPECT_EQ(second.tenant.limits, server::TenantLimits{});
  EXPECT_TRUE(!entries->at(2).read && entries->at(2).write);
}

TEST(TokenFileTest, ErrorsNameLineAndExpectationAndNoToken) {
  const std::string good = absl::StrCat(kToken, " alice read\n");
  const std::pair<std::string, std::string> cases[] = {
      {"", "at least one token"},
      {"# nobody\n", "at least one token"},
      {good + kOther, "line 2: expected TOKEN TENANT SCOPES"},
      {absl::StrCat(good, kOther, " bob"), "line 2: expected TOKEN TENANT SCOPES"},
      {good + "\n\nshort-secret-15 bob read", "line 4: expected a token of at least 16"},
      {good + "secret-token-\xc3\xa4\xc3\xb6 bob read", "printable ASCII"},
      {good + "sha256:0123-secret bob read", "64 hex digits"},
      {good + "sha256:" + std::string(64, 'g') + " bob read", "64 hex digits"},
      // Fields in another order: any of them may be the token.
      {absl::StrCat(good, "bob-or-someone-else ", kOther, " read"), "a tenant of 1 to 64"},
      {absl::StrCat(good, "bob-or-someone-else read ", kOther), "scopes"},
      {absl::StrCat(good, kOther, " bob read ", kToken), "field 4"},
      {absl::StrCat(good, kOther, " ", std::string(65, 'x'), " read"), "a tenant of 1 to 64"},
      {absl::StrCat(good, kOther, " a/b read"), "a tenant of 1 to 64"},
      {absl::StrCat(good, kOther, " bob admin"), "scopes"},
      {absl::StrCat(good, kOther, " bob read,"), "scopes"},
      {absl::StrCat(good, kOther, " bob read,read"), "scopes"},
      {absl::StrCat(good, kOther, " bob read jobs"), "field 4"},
      {absl::StrCat(good, kOther, " bob read jobs="), "field 4"},
      {absl::StrCat(good, kOther, " bob read jobs=-1"), "field 4"},
      {absl::StrCat(good, kOther, " bob read jobs=+1"), "field 4"},
      {absl::StrCat(good, kOther, " bob read jobs=1e3"), "field 4"},
      {absl::StrCat(good, kOther, " bob read jobs=9223372036854775808"), "field 4"},
      {absl::StrCat(good, kOther, " bob read cpus=1"), "field 4"},
      {absl::StrCat(good, kOther, " bob read jobs=1 jobs=1"), "field 5"},
      {absl::StrCat(good, kToken, " bob read"), "line 2: expected another token than in line 1"},
      {absl::StrCat(good, "sha256:", HexOf(kToken), " bob read"), "another token"},
      {absl::StrCat(good, kOther, " alice read jobs=1"),
       "the limits that this tenant has in line 1"},
  };
  for (const auto& [text, expected] : cases) {
    const absl::Status status = ParseTokens(text).status();
    EXPECT_TRUE(absl::IsInvalidArgument(status)) << text;
    EXPECT_CONTAINS(status.message(), expected);
    EXPECT_EQ(status.message().find("secret"), absl::string_view::npos) << status;
  }
}

}  // namespace
}  // namespace certiq::testing
