// TLS credentials: files at the start, handshakes over TCP, files that change.

#include "rpc/transport/credentials.h"

#include <grpc/grpc_security_constants.h>
#include <grpcpp/security/credentials.h>
#include <gtest/gtest.h>

#include <filesystem>
#include <memory>
#include <string>

#include "absl/strings/str_cat.h"
#include "certificates.h"
#include "rpc/transport/auth.h"
#include "rpc/transport/probe.h"
#include "support/text.h"
#include "test_server.h"

namespace certiq::testing {
namespace {

using server::TlsFiles;

class CredentialsTest : public ::testing::Test {
 protected:
  CredentialsTest() {
    folder_.Write("cert", identity_.cert);
    folder_.Write("key", identity_.key);
    folder_.Write("ca", authority_.cert);
  }

  absl::Status Check(const std::string& cert, const std::string& key,
                     const std::string& client_ca = "") {
    const auto path = [this](const std::string& name) {
      return name.empty() ? name : folder_.Path(name);
    };
    return server::ServerCredentials({path(cert), path(key), path(client_ca)}, warnings_.Sink())
        .status();
  }
  std::unique_ptr<TestServer> Start(bool client_certificates = false) {
    TestServer::Options options;
    options.tls = files_;
    if (client_certificates) options.tls.client_ca = folder_.Path("ca");
    return std::make_unique<TestServer>(options);
  }
  static std::shared_ptr<grpc::ChannelCredentials> Trusting(const Identity& authority,
                                                            const Identity& own = {}) {
    return grpc::SslCredentials({authority.cert, own.key, own.cert});
  }
  // The certificate that the server presents to a new connection, or the error.
  static std::string Shown(const TestServer& server,
                           const std::shared_ptr<grpc::ChannelCredentials>& credentials) {
    const auto stub = v1::QuantizationService::NewStub(server.NewChannel(credentials));
    grpc::ClientContext context;
    context.set_deadline(std::chrono::system_clock::now() + kPatience);
    const auto stream = stub->Quantize(&context);
    stream->WritesDone();
    const grpc::Status status = stream->Finish();
    // A call that connects is refused for want of a header message.
    if (status.error_code() != grpc::StatusCode::INVALID_ARGUMENT) {
      return "refused: " + status.error_message();
    }
    const auto found = context.auth_context()->FindPropertyValues(GRPC_X509_PEM_CERT_PROPERTY_NAME);
    return found.size() == 1 ? std::string(found[0].data(), found[0].size()) : "none";
  }
  static std::string AddressOf(const TestServer& server) {
    return absl::StrCat("127.0.0.1:", server.server->port());
  }

  Folder folder_;
  Warnings warnings_;
  const Identity authority_ = MakeAuthority("authority");
  const Identity stranger_ = MakeAuthority("stranger");
  const Identity identity_ = MakeIdentity(authority_, "server");
  const Identity client_ = MakeIdentity(authority_, "client");
  const TlsFiles files_{folder_.Path("cert"), folder_.Path("key"), ""};
};

TEST_F(CredentialsTest, GoodFiles) {
  EXPECT_TRUE(Check("", "").ok());
  EXPECT_TRUE(Check("cert", "key").ok());
  EXPECT_TRUE(Check("cert", "key", "ca").ok());
  EXPECT_TRUE(warnings_.all().empty());
}

TEST_F(CredentialsTest, FlagsThatNeedEachOther) {
  EXPECT_CONTAINS(Check("cert", "").message(), "--tls_cert: expected --tls_key");
  EXPECT_CONTAINS(Check("", "key").message(), "--tls_key: expected --tls_cert");
  EXPECT_CONTAINS(Check("", "", "ca").message(), "--tls_client_ca: expected --tls_cert");
}

TEST_F(CredentialsTest, BadFilesAreNamed) {
  folder_.Write("garbage", "-----BEGIN CERTIFICATE-----\nnonsense\n-----END CERTIFICATE-----\n");
  folder_.Write("empty", "");
  folder_.Write("other key", client_.key);
  for (const char* bad : {"garbage", "empty", "missing", "key"}) {
    const absl::Status status = Check(bad, "key");
    EXPECT_TRUE(absl::IsInvalidArgument(status)) << bad;
    EXPECT_CONTAINS(status.message(), absl::StrCat("--tls_cert: ", folder_.Path(bad)));
    EXPECT_CONTAINS(Check("cert", "key", bad).message(),
                    absl::StrCat("--tls_client_ca: ", folder_.Path(bad)));
  }
  for (const char* bad : {"garbage", "empty", "missing", "cert", "other key"}) {
    const absl::Status status = Check("cert", bad);
    EXPECT_TRUE(absl::IsInvalidArgument(status)) << bad;
    EXPECT_CONTAINS(status.message(), absl::StrCat("--tls_key: ", folder_.Path(bad)));
    EXPECT_EQ(status.message().find("BEGIN"), absl::string_view::npos);
  }
}

TEST_F(CredentialsTest, WarnsOfDatesAndOfKeysOpenToOthers) {
  const Identity old = MakeIdentity(authority_, "old", -1);
  folder_.Write("cert", old.cert);
  folder_.Write("key", old.key);
  std::filesystem::permissions(folder_.Path("key"), std::filesystem::perms::others_read,
                               std::filesystem::perm_options::add);
  EXPECT_TRUE(Check("cert", "key").ok());
  ASSERT_EQ(warnings_.all().size(), 2U);
  EXPECT_CONTAINS(warnings_.all()[0], "has expired");
  EXPECT_CONTAINS(warnings_.all()[1], "chmod");
}

TEST_F(CredentialsTest, ServesThoseWhoTrustIt) {
  const auto server = Start();
  EXPECT_EQ(Shown(*server, Trusting(authority_)), identity_.cert);
  EXPECT_CONTAINS(Shown(*server, Trusting(stranger_)), "refused");
  EXPECT_CONTAINS(Shown(*server, grpc::InsecureChannelCredentials()), "refused");
}

TEST_F(CredentialsTest, ClientCertificates) {
  const auto server = Start(true);
  EXPECT_EQ(Shown(*server, Trusting(authority_, client_)), identity_.cert);
  EXPECT_CONTAINS(Shown(*server, Trusting(authority_)), "refused");
  EXPECT_CONTAINS(Shown(*server, Trusting(authority_, MakeIdentity(stranger_, "client"))),
                  "refused");
  EXPECT_CONTAINS(Shown(*server, Trusting(authority_, MakeIdentity(authority_, "old", -1))),
                  "refused");
}

TEST_F(CredentialsTest, NewFilesAreUsedByNewConnections) {
  const auto server = Start(true);
  const auto old = Trusting(authority_, client_);
  EXPECT_EQ(Shown(*server, old), identity_.cert);

  // Unusable files: new connections may fail meanwhile, and succeed again with usable files.
  folder_.Write("cert", "garbage");
  EXPECT_TRUE(TestServer::Eventually([&] { return Shown(*server, old) != identity_.cert; }));

  const Identity next = MakeIdentity(stranger_, "next");
  folder_.Write("key", next.key);
  folder_.Write("cert", next.cert);
  folder_.Write("ca", stranger_.cert);
  const auto fresh = Trusting(stranger_, MakeIdentity(stranger_, "client"));
  EXPECT_TRUE(TestServer::Eventually([&] { return Shown(*server, fresh) == next.cert; }));
  EXPECT_CONTAINS(Shown(*server, old), "refused");
}

TEST_F(CredentialsTest, ProbeKnowsTheServersOwnCertificate) {
  const auto server = Start();
  EXPECT_TRUE(server::Probe(AddressOf(*server), files_, kPatience).ok());
  EXPECT_FALSE(server::Probe(AddressOf(*server), {}, kPatience).ok());
  folder_.Write("other cert", client_.cert);
  folder_.Write("other key", client_.key);
  EXPECT_FALSE(server::Probe(AddressOf(*server),
                             {folder_.Path("other cert"), folder_.Path("other key"), ""},
                             std::chrono::seconds(2))
                   .ok());
  EXPECT_CONTAINS(
      server::Probe(AddressOf(*server), {folder_.Path("cert"), "", ""}, kPatience).message(),
      "--tls_key");
}

TEST_F(CredentialsTest, ProbeShowsTheServersOwnCertificate) {
  const auto server = Start(true);
  EXPECT_TRUE(server::Probe(AddressOf(*server), files_, kPatience).ok());
}

TEST_F(CredentialsTest, BeyondLoopbackWithTlsAndWarningWithoutIt) {
  folder_.Write("tokens", "alice-secret-token alice read\n");
  const auto auth = server::Authenticator::Open(folder_.Path("tokens"), nullptr);
  ASSERT_TRUE(auth.ok());
  const auto backend = MakeBackend();
  const auto start = [&](const TlsFiles& tls, bool allow_cleartext) {
    return server::Server::Start({.listen = "0.0.0.0:0",
                                  .tls = tls,
                                  .allow_cleartext = allow_cleartext,
                                  .backend = backend.get(),
                                  .auth = auth->get(),
                                  .warn = warnings_.Sink()})
        .status();
  };
  EXPECT_TRUE(start(files_, false).ok());
  EXPECT_TRUE(warnings_.all().empty());
  EXPECT_TRUE(absl::IsFailedPrecondition(start({}, false)));
  EXPECT_TRUE(start({}, true).ok());
  ASSERT_EQ(warnings_.all().size(), 1U);
  EXPECT_CONTAINS(warnings_.all()[0], "in clear text");
}

}  // namespace
}  // namespace certiq::testing
