// Authenticator: header values, changes of the token file, calls over TCP.

#include "rpc/transport/auth.h"

#include <gtest/gtest.h>

#include <atomic>
#include <filesystem>
#include <memory>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "certificates.h"
#include "rpc/transport/probe.h"
#include "support/requests.h"
#include "support/text.h"
#include "test_server.h"

namespace certiq::testing {
namespace {

using grpc::StatusCode;
using server::Authenticator;
using server::Scope;
using Values = std::vector<absl::string_view>;

constexpr char kTokens[] =
    "alice-secret-token alice read,write jobs=3\n"
    "reader-secret-token reader read\n"
    "writer-secret-token writer write\n";

class AuthTest : public ::testing::Test {
 protected:
  std::unique_ptr<Authenticator> Open(std::chrono::milliseconds check_interval = {}) {
    auto opened = Authenticator::Open(folder_.Path("tokens"), warnings_.Sink(), check_interval);
    EXPECT_TRUE(opened.ok()) << opened.status();
    return *std::move(opened);
  }
  static absl::StatusCode Code(Authenticator& auth, const std::string& token,
                               Scope scope = Scope::kRead) {
    const std::string value = "Bearer " + token;
    return auth.Authenticate(Values{value}, scope).status().code();
  }

  Folder folder_;
  Warnings warnings_;
};

TEST_F(AuthTest, WithoutAFileEveryoneIsLetIn) {
  Authenticator auth;
  EXPECT_FALSE(auth.enabled());
  for (const Values& values : {Values{}, Values{"x"}, Values{"Bearer a", "Bearer b"}}) {
    const auto caller = auth.Authenticate(values, Scope::kWrite);
    ASSERT_TRUE(caller.ok());
    EXPECT_EQ(caller->tenant.name, "");
    EXPECT_EQ(caller->tenant.limits, server::TenantLimits{});
  }
}

TEST_F(AuthTest, KnowsTokensAndScopes) {
  folder_.Write("tokens", kTokens);
  const auto auth = Open();
  EXPECT_TRUE(auth->enabled());
  for (const char* value :
       {"Bearer alice-secret-token", "bearer alice-secret-token", "BEARER   alice-secret-token"}) {
    const auto caller = auth->Authenticate(Values{value}, Scope::kWrite);
    ASSERT_TRUE(caller.ok()) << value;
    EXPECT_EQ(caller->tenant.name, "alice");
    EXPECT_EQ(caller->tenant.limits.jobs, 3);
  }
  EXPECT_EQ(Code(*auth, "alice-secret-token", Scope::kRead), absl::StatusCode::kOk);
  EXPECT_EQ(Code(*auth, "reader-secret-token", Scope::kRead), absl::StatusCode::kOk);
  EXPECT_EQ(Code(*auth, "writer-secret-token", Scope::kWrite), absl::StatusCode::kOk);
  const auto denied = auth->Authenticate(Values{"Bearer reader-secret-token"}, Scope::kWrite);
  EXPECT_TRUE(absl::IsPermissionDenied(denied.status()));
  EXPECT_CONTAINS(denied.status().message(), "\"write\"");
  EXPECT_EQ(Code(*auth, "writer-secret-token", Scope::kRead), absl::StatusCode::kPermissionDenied);
  EXPECT_TRUE(warnings_.all().empty());
}

TEST_F(AuthTest, RefusesAllElse) {
  folder_.Write("tokens", absl::StrCat(kTokens, "sha256:", std::string(64, '0'), " eve read\n"));
  const auto auth = Open();
  const std::string digest = "Bearer sha256:" + std::string(64, '0');
  const std::string huge = "Bearer " + std::string(1 << 20, 'x');
  const std::string binary("Bearer \0\xff\n\x1b[31m secret", 21);
  for (const Values& values :
       {Values{}, Values{""}, Values{"Bearer"}, Values{"Bearer "}, Values{"alice-secret-token"},
        Values{"Basic alice-secret-token"}, Values{"Bearer\talice-secret-token"},
        Values{"Beareralice-secret-token"}, Values{" Bearer alice-secret-token"},
        Values{"Bearer alice-secret-toke"}, Values{"Bearer alice-secret-token "},
        Values{"Bearer alice-secret-token,reader-secret-token"},
        Values{"Bearer Alice-secret-token"}, Values{huge}, Values{binary}, Values{digest},
        Values{"Bearer alice-secret-token", "Bearer alice-secret-token"},
        Values{"Bearer alice-secret-token", "x"}}) {
    const absl::Status status = auth->Authenticate(values, Scope::kRead).status();
    EXPECT_TRUE(absl::IsUnauthenticated(status)) << status;
    EXPECT_CONTAINS(status.message(), "authorization: Bearer TOKEN");
    EXPECT_EQ(status.message().find("secret"), absl::string_view::npos) << status;
    EXPECT_LT(status.message().size(), 200U);
  }
}

TEST_F(AuthTest, BadFilesAreErrorsAtStart) {
  const auto open = [&] {
    return Authenticator::Open(folder_.Path("tokens"), warnings_.Sink()).status();
  };
  EXPECT_CONTAINS(open().message(), absl::StrCat("--token_file: ", folder_.Path("tokens")));
  folder_.Write("tokens", "secret alice read\n");
  EXPECT_TRUE(absl::IsInvalidArgument(open()));
  EXPECT_CONTAINS(open().message(), "line 1");
  folder_.Write("tokens", std::string((1 << 20) + 1, '\n'));
  EXPECT_CONTAINS(open().message(), "1 MiB");
  std::filesystem::remove(folder_.Path("tokens"));
  std::filesystem::create_directory(folder_.Path("tokens"));
  EXPECT_CONTAINS(open().message(), "regular file");
}

TEST_F(AuthTest, FilesOpenToOthersAreWarnedOf) {
  folder_.Write("tokens", kTokens);
  std::filesystem::permissions(folder_.Path("tokens"), std::filesystem::perms::others_read,
                               std::filesystem::perm_options::add);
  EXPECT_EQ(Code(*Open(), "alice-secret-token"), absl::StatusCode::kOk);
  ASSERT_EQ(warnings_.all().size(), 1U);
  EXPECT_CONTAINS(warnings_.all()[0], "chmod");
}

TEST_F(AuthTest, FollowsTheFile) {
  folder_.Write("tokens", kTokens);
  const auto auth = Open();
  folder_.Write("tokens", "newcomer-secret-token new read\n");
  EXPECT_EQ(Code(*auth, "newcomer-secret-token"), absl::StatusCode::kOk);
  EXPECT_EQ(Code(*auth, "alice-secret-token"), absl::StatusCode::kUnauthenticated);
  EXPECT_TRUE(warnings_.all().empty());
}

TEST_F(AuthTest, BadFilesLaterChangeNothingAndAreWarnedOfOnce) {
  folder_.Write("tokens", kTokens);
  const auto auth = Open();
  size_t warned = 0;
  for (const char* text : {"", "half-a-secret-tok", "secret a read\n"}) {
    folder_.Write("tokens", text);
    ++warned;
    for (int i = 0; i < 3; ++i) {
      EXPECT_EQ(Code(*auth, "alice-secret-token"), absl::StatusCode::kOk);
      EXPECT_EQ(warnings_.all().size(), warned);
    }
    EXPECT_CONTAINS(warnings_.all().back(), "stay valid");
    EXPECT_EQ(warnings_.all().back().find("secret"), std::string::npos);
  }
  std::filesystem::remove(folder_.Path("tokens"));
  EXPECT_EQ(Code(*auth, "alice-secret-token"), absl::StatusCode::kOk);
  EXPECT_EQ(warnings_.all().size(), ++warned);
  folder_.Write("tokens", "newcomer-secret-token new read\n");
  EXPECT_EQ(Code(*auth, "alice-secret-token"), absl::StatusCode::kUnauthenticated);
  EXPECT_EQ(warnings_.all().size(), warned);
}

// Kubernetes mounts tokens -> ..data/tokens and ..data -> a folder; an update renames a new ..data
// over the old one.
TEST_F(AuthTest, FollowsSymlinksThatAreSwapped) {
  namespace fs = std::filesystem;
  for (const char* version : {"1", "2"}) fs::create_directory(folder_.Path(version));
  folder_.Write("1/tokens", "alice-secret-token alice read\n");
  folder_.Write("2/tokens", "clara-secret-token clara read\n");
  fs::create_symlink("1", folder_.Path("..data"));
  fs::create_symlink("..data/tokens", folder_.Path("tokens"));
  const auto auth = Open();
  EXPECT_EQ(Code(*auth, "alice-secret-token"), absl::StatusCode::kOk);
  fs::create_symlink("2", folder_.Path("..data.new"));
  fs::rename(folder_.Path("..data.new"), folder_.Path("..data"));
  EXPECT_EQ(Code(*auth, "clara-secret-token"), absl::StatusCode::kOk);
  EXPECT_EQ(Code(*auth, "alice-secret-token"), absl::StatusCode::kUnauthenticated);
}

TEST_F(AuthTest, LooksAtTheFileNowAndThenOnly) {
  folder_.Write("tokens", kTokens);
  const auto auth = Open(std::chrono::hours(1));
  folder_.Write("tokens", "newcomer-secret-token new read\n");
  EXPECT_EQ(Code(*auth, "alice-secret-token"), absl::StatusCode::kOk);
}

TEST_F(AuthTest, CallsMayComeWhileTheFileChanges) {
  folder_.Write("tokens", kTokens);
  const auto auth = Open();
  std::atomic<bool> stop{false};
  std::atomic<int> refused{0};
  {
    std::vector<std::jthread> callers;
    callers.reserve(3);
    for (int i = 0; i < 3; ++i) {
      callers.emplace_back([&] {
        while (!stop) refused += Code(*auth, "alice-secret-token") != absl::StatusCode::kOk;
      });
    }
    for (int i = 0; i < 200; ++i) {
      folder_.Write("tokens", absl::StrCat(kTokens, "token-number-", 10000 + i, " more read\n"));
      EXPECT_EQ(Code(*auth, absl::StrCat("token-number-", 10000 + i)), absl::StatusCode::kOk);
    }
    stop = true;
  }
  EXPECT_EQ(refused, 0);
  EXPECT_TRUE(warnings_.all().empty());
}

// Calls over TCP.

struct Caller {
  explicit Caller(const TestServer& server, const Values& values = {}) : stub(server.NewStub()) {
    for (const absl::string_view value : values) {
      context.AddMetadata("authorization", std::string(value));
    }
    context.set_deadline(std::chrono::system_clock::now() + kPatience);
    stream = stub->Quantize(&context);
  }
  grpc::ClientContext context;
  std::unique_ptr<v1::QuantizationService::Stub> stub;
  std::unique_ptr<grpc::ClientReaderWriter<v1::QuantizeRequest, v1::QuantizeResponse>> stream;
};

class AuthServerTest : public AuthTest {
 protected:
  AuthServerTest() {
    folder_.Write("tokens", kTokens);
    auth_ = Open();
    TestServer::Options options;
    options.auth = auth_.get();
    server_ = std::make_unique<TestServer>(options);
  }
  double Handled(const std::string& code) {
    return server_->Metric(
        absl::StrCat("grpc_server_handled_total{grpc_code=\"", code,
                     "\",grpc_method=\"Quantize\",grpc_service=\"certiq.v1.QuantizationService\","
                     "grpc_type=\"bidi_stream\"}"));
  }
  // The status of a call that sends nothing and waits for an answer.
  grpc::Status Silent(const Values& values) { return Caller(*server_, values).stream->Finish(); }

  std::unique_ptr<Authenticator> auth_;
  std::unique_ptr<TestServer> server_;
};

TEST_F(AuthServerTest, RefusesBeforeReading) {
  const std::string large = "Bearer " + std::string(6000, 'x');
  for (const Values& values :
       {Values{}, Values{"Bearer nobody-secret-token"}, Values{"Basic YWxhZGRpbg=="},
        Values{"Bearer alice-secret-token", "Bearer alice-secret-token"}, Values{large}}) {
    const grpc::Status status = Silent(values);
    EXPECT_EQ(status.error_code(), StatusCode::UNAUTHENTICATED) << status.error_message();
    EXPECT_CONTAINS(status.error_message(), "Bearer TOKEN");
  }
  const grpc::Status denied = Silent({"Bearer reader-secret-token"});
  EXPECT_EQ(denied.error_code(), StatusCode::PERMISSION_DENIED) << denied.error_message();
  ASSERT_TRUE(TestServer::Eventually([&] { return server_->finished().size() == 6; }));
  for (const server::CallSummary& call : server_->finished()) {
    EXPECT_STREQ(call.method, "Quantize");
    EXPECT_EQ(call.received_bytes, 0);
    EXPECT_EQ(call.tenant, "");
  }
  EXPECT_EQ(Handled("Unauthenticated"), 5);
  EXPECT_EQ(Handled("PermissionDenied"), 1);
}

TEST_F(AuthServerTest, HugeHeadersAreRefused) {
  EXPECT_FALSE(Silent({"Bearer " + std::string(1 << 20, 'x')}).ok());
  EXPECT_TRUE(
      server::Probe(absl::StrCat("127.0.0.1:", server_->server->port()), {}, kPatience).ok());
}

TEST_F(AuthServerTest, ServesWhoMayAndNamesTheTenantInTheLogOnly) {
  Caller caller(*server_, {"Bearer alice-secret-token"});
  for (const auto& request : QuantizeRequestsFor(MakeRandomLayer(8, 16, 32))) {
    ASSERT_TRUE(caller.stream->Write(request));
  }
  caller.stream->WritesDone();
  v1::QuantizeResponse response;
  while (caller.stream->Read(&response)) {
  }
  const grpc::Status status = caller.stream->Finish();
  EXPECT_TRUE(status.ok()) << status.error_message();
  ASSERT_TRUE(TestServer::Eventually([&] { return server_->finished().size() == 1; }));
  EXPECT_EQ(server_->finished()[0].tenant, "alice");
  const std::string page = server_->Http("/metrics");
  EXPECT_EQ(page.find("alice"), std::string::npos);
}

TEST_F(AuthServerTest, HealthIsOpen) {
  EXPECT_TRUE(
      server::Probe(absl::StrCat("127.0.0.1:", server_->server->port()), {}, kPatience).ok());
}

TEST_F(AuthServerTest, ShutdownWhileCallsAreRefused) {
  std::vector<std::unique_ptr<Caller>> callers(20);
  for (auto& caller : callers) caller = std::make_unique<Caller>(*server_);
  server_->server->Shutdown();
  for (const auto& caller : callers) EXPECT_FALSE(caller->stream->Finish().ok());
}

}  // namespace
}  // namespace certiq::testing
