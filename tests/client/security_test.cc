// Tokens and TLS files: what is sent, and what is rejected before anything is.
#include <string>
#include <utility>
#include <vector>

#include "certiq/client.h"
#include "fake_server.h"
#include "gtest/gtest.h"
#include "temporary_folder.h"
#include "test_client.h"
#include "test_util.h"

namespace certiq {
namespace {

using testing::Answering;
using testing::Contains;
using testing::FakeServer;
using testing::Layer;
using testing::MakeLayer;
using testing::ServerStream;
using testing::TemporaryFolder;
using testing::TestClient;
using testing::WriteFile;

// The values of "authorization" that a call of a client with this token brings, over two tries.
std::vector<std::string> Sent(const std::string& token) {
  std::vector<std::string> values;
  FakeServer server([&values](int call, grpc::ServerContext* context, ServerStream* stream) {
    const auto [first, last] = context->client_metadata().equal_range("authorization");
    for (auto entry = first; entry != last; ++entry) {
      values.emplace_back(entry->second.data(), entry->second.size());
    }
    if (call == 1) return grpc::Status(grpc::StatusCode::UNAVAILABLE, "again");
    return Answering()(call, context, stream);
  });
  const TestClient client(server.address(), {.token = token});
  const absl::Status status = client->Quantize(MakeLayer(4, 8, 16).Request()).status();
  EXPECT_TRUE(status.ok()) << status;
  return values;
}

TEST(SecurityTest, EveryTryCarriesTheToken) {
  EXPECT_EQ(Sent("s3cret-~!"), std::vector<std::string>(2, "Bearer s3cret-~!"));
  EXPECT_EQ(Sent(std::string(4096, 'x')).size(), 2U);
  EXPECT_TRUE(Sent("").empty());
}

TEST(SecurityTest, TokensThatNoHeaderHoldsAreRejected) {
  for (const std::string& token : std::vector<std::string>{
           "a secret", "secret\n", "secret\r\nx: y", std::string("secret\0", 7), "secret\xc3\xa4",
           std::string(4097, 'x')}) {
    const absl::Status status = Client::Create({.address = "localhost:1", .token = token}).status();
    EXPECT_TRUE(absl::IsInvalidArgument(status)) << status;
    EXPECT_FALSE(Contains(status.message(), "secret")) << status;
  }
}

TEST(SecurityTest, TokensStayOnThisMachineWithoutTls) {
  for (const char* address : {"localhost:1", "127.0.0.1:1", "127.9.8.7:1", "[::1]:1"}) {
    EXPECT_TRUE(Client::Create({.address = address, .token = "secret"}).ok()) << address;
  }
  for (const char* address : {"example.com:1", "10.0.0.1:1", "127.example.com:1", "127.0.0.1.x:1",
                              "127.0.0:1", "127.0.0.256:1", "localhost.x:1", "[::2]:1"}) {
    const absl::Status status = Client::Create({.address = address, .token = "secret"}).status();
    EXPECT_TRUE(absl::IsFailedPrecondition(status)) << address;
    EXPECT_TRUE(Contains(status.message(), "clear text"));
    EXPECT_FALSE(Contains(status.message(), "secret"));
    EXPECT_TRUE(Client::Create({.address = address}).ok());
    EXPECT_TRUE(Client::Create({.address = address, .tls = TlsOptions{}, .token = "secret"}).ok());
    EXPECT_TRUE(
        Client::Create({.address = address, .token = "secret", .allow_cleartext = true}).ok());
  }
}

TEST(SecurityTest, FilesForTlsThatDoNotServeAreNamed) {
  const TemporaryFolder folder;
  const std::string garbage = folder.Path("garbage");
  WriteFile(garbage, "-----BEGIN CERTIFICATE-----\nnonsense\n-----END CERTIFICATE-----\n");
  const std::string missing = folder.Path("missing");
  const std::pair<TlsOptions, std::string> cases[] = {
      {{.ca_file = garbage}, "tls.ca_file: " + garbage},
      {{.ca_file = missing}, "tls.ca_file: " + missing},
      {{.cert_file = garbage, .key_file = garbage}, "tls.cert_file: " + garbage},
      {{.cert_file = missing, .key_file = garbage}, "tls.cert_file: " + missing},
      {{.cert_file = garbage}, "tls.cert_file and tls.key_file"},
      {{.key_file = garbage}, "tls.cert_file and tls.key_file"},
  };
  for (const auto& [tls, expected] : cases) {
    const absl::Status status = Client::Create({.address = "h:1", .tls = tls}).status();
    EXPECT_TRUE(absl::IsInvalidArgument(status)) << status;
    EXPECT_TRUE(Contains(status.message(), expected)) << status;
  }
}

}  // namespace
}  // namespace certiq
