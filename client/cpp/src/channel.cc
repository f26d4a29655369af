#include "channel.h"

#include <string>
#include <utility>
#include <vector>

#include "absl/status/status.h"
#include "absl/strings/match.h"
#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_split.h"
#include "absl/strings/string_view.h"
#include "absl/strings/strip.h"
#include "base/status_macros.h"
#include "grpcpp/create_channel.h"
#include "grpcpp/security/credentials.h"
#include "grpcpp/support/channel_arguments.h"
#include "grpcpp/support/client_interceptor.h"
#include "tls_files.h"

namespace certiq {
namespace {

// With the rest of a call's metadata it has to fit the 8 KiB that servers accept.
constexpr size_t kMaxTokenBytes = 4096;

absl::string_view HostOf(absl::string_view address) {
  absl::string_view host = address.substr(0, address.rfind(':'));
  absl::ConsumePrefix(&host, "[");
  absl::ConsumeSuffix(&host, "]");
  return host;
}

// 127.a.b.c and nothing that only begins like it: "127.example.com" may be anywhere.
bool IsLoopback(absl::string_view host) {
  if (host == "localhost" || host == "::1") return true;
  const std::vector<absl::string_view> parts = absl::StrSplit(host, '.');
  if (parts.size() != 4 || parts[0] != "127") return false;
  for (const absl::string_view part : parts) {
    int number = 0;
    if (part.empty() || part.find_first_not_of("0123456789") != absl::string_view::npos ||
        !absl::SimpleAtoi(part, &number) || number > 255) {
      return false;
    }
  }
  return true;
}

grpc::ChannelArguments ArgumentsFor(const ClientOptions& options) {
  grpc::ChannelArguments arguments;
  // A proxy of the environment cannot reach this machine's own servers.
  if (IsLoopback(HostOf(options.address))) arguments.SetInt(GRPC_ARG_ENABLE_HTTP_PROXY, 0);
  // Between the tries of a call the channel must be allowed to connect again.
  arguments.SetInt(GRPC_ARG_INITIAL_RECONNECT_BACKOFF_MS, 100);
  arguments.SetInt(GRPC_ARG_MAX_RECONNECT_BACKOFF_MS, 5000);
  arguments.SetInt(GRPC_ARG_MIN_RECONNECT_BACKOFF_MS,
                   static_cast<int>(absl::ToInt64Milliseconds(options.connect_timeout)));
  // Pings find out that a peer is gone without having closed the connection. Servers by default
  // close connections that ping more often than every five minutes.
  arguments.SetInt(GRPC_ARG_KEEPALIVE_TIME_MS, 330'000);
  arguments.SetInt(GRPC_ARG_KEEPALIVE_TIMEOUT_MS, 20'000);
  arguments.SetInt(GRPC_ARG_HTTP2_MAX_PINGS_WITHOUT_DATA, 0);
  if (options.tls.has_value() && !options.tls->server_name.empty()) {
    arguments.SetSslTargetNameOverride(options.tls->server_name);
  }
  return arguments;
}

absl::Status CheckToken(const ClientOptions& options) {
  if (options.token.empty()) return absl::OkStatus();
  bool valid = options.token.size() <= kMaxTokenBytes;
  for (const char c : options.token) valid = valid && c > ' ' && c <= '~';
  if (!valid) {
    return absl::InvalidArgumentError(absl::StrCat("token: expected at most ", kMaxTokenBytes,
                                                   " printable ASCII characters without blanks"));
  }
  if (!options.tls.has_value() && !options.allow_cleartext &&
      !IsLoopback(HostOf(options.address))) {
    return absl::FailedPreconditionError(absl::StrCat(
        "token: it would travel to ", options.address,
        " in clear text, for everyone on the way to read; use TLS, or allow_cleartext"));
  }
  return absl::OkStatus();
}

// Adds the token to a call; on the channel, where no call can forget it. (Credentials of a call
// would do the same, but not in clear text.)
class TokenInterceptor final : public grpc::experimental::Interceptor {
 public:
  explicit TokenInterceptor(const std::string& value) : value_(value) {}

  void Intercept(grpc::experimental::InterceptorBatchMethods* methods) override {
    if (methods->QueryInterceptionHookPoint(
            grpc::experimental::InterceptionHookPoints::PRE_SEND_INITIAL_METADATA)) {
      methods->GetSendInitialMetadata()->emplace("authorization", value_);
    }
    methods->Proceed();
  }

 private:
  const std::string& value_;  // the factory's, which lives as long as the channel
};

class TokenInterceptors final : public grpc::experimental::ClientInterceptorFactoryInterface {
 public:
  explicit TokenInterceptors(const std::string& token) : value_(absl::StrCat("Bearer ", token)) {}

  grpc::experimental::Interceptor* CreateClientInterceptor(
      grpc::experimental::ClientRpcInfo* /*info*/) override {
    return new TokenInterceptor(value_);  // gRPC deletes it with the call
  }

 private:
  const std::string value_;
};

}  // namespace

absl::Status CheckAddress(const std::string& address) {
  const size_t colon = address.rfind(':');
  const absl::string_view host = HostOf(address);
  int port = 0;
  const bool bracketed = absl::StartsWith(address, "[") && colon != std::string::npos &&
                         colon > 0 && address[colon - 1] == ']';
  if (colon == std::string::npos || host.empty() ||
      (host.find(':') != absl::string_view::npos && !bracketed) ||
      host.find_first_of("/ []") != absl::string_view::npos ||
      !absl::SimpleAtoi(address.substr(colon + 1), &port) || port < 1 || port > 65535) {
    return absl::InvalidArgumentError(
        absl::StrCat("address: expected HOST:PORT, got \"", address, "\""));
  }
  return absl::OkStatus();
}

absl::StatusOr<std::shared_ptr<grpc::Channel>> MakeChannel(const ClientOptions& options) {
  RETURN_IF_ERROR(CheckToken(options));
  std::shared_ptr<grpc::ChannelCredentials> credentials = grpc::InsecureChannelCredentials();
  if (options.tls.has_value()) {
    ASSIGN_OR_RETURN(TlsFiles files, ReadTlsFiles(*options.tls));
    credentials = grpc::SslCredentials({.pem_root_certs = std::move(files.ca),
                                        .pem_private_key = std::move(files.key),
                                        .pem_cert_chain = std::move(files.cert)});
  }
  const grpc::ChannelArguments arguments = ArgumentsFor(options);
  if (options.token.empty()) {
    return grpc::CreateCustomChannel(options.address, credentials, arguments);
  }
  std::vector<std::unique_ptr<grpc::experimental::ClientInterceptorFactoryInterface>> interceptors;
  interceptors.push_back(std::make_unique<TokenInterceptors>(options.token));
  return grpc::experimental::CreateCustomChannelWithInterceptors(
      options.address, credentials, arguments, std::move(interceptors));
}

}  // namespace certiq
