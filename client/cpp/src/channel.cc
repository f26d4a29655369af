#include "channel.h"

#include <string>

#include "absl/strings/match.h"
#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/string_view.h"
#include "absl/strings/strip.h"
#include "grpcpp/create_channel.h"
#include "grpcpp/security/credentials.h"
#include "grpcpp/support/channel_arguments.h"
#include "request_check.h"

namespace certiq {
namespace {

absl::string_view HostOf(absl::string_view address) {
  absl::string_view host = address.substr(0, address.rfind(':'));
  absl::ConsumePrefix(&host, "[");
  absl::ConsumeSuffix(&host, "]");
  return host;
}

bool IsLoopback(absl::string_view host) {
  return host == "localhost" || host == "::1" || host.substr(0, 4) == "127.";
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
  // A machine that vanished without a word is noticed. Servers by default punish pings that come
  // more often than every five minutes.
  arguments.SetInt(GRPC_ARG_KEEPALIVE_TIME_MS, 330'000);
  arguments.SetInt(GRPC_ARG_KEEPALIVE_TIMEOUT_MS, 20'000);
  arguments.SetInt(GRPC_ARG_HTTP2_MAX_PINGS_WITHOUT_DATA, 0);
  return arguments;
}

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

absl::StatusOr<std::shared_ptr<grpc::Channel>> MakeChannel(ClientOptions* options) {
  if (absl::Status status = CheckAddress(options->address); !status.ok()) return status;
  if (options->tls.has_value()) return absl::UnimplementedError("tls: not built yet");
  if (!options->token.empty()) return absl::UnimplementedError("token: not built yet");
  if (options->chunk_bytes < 1 || options->chunk_bytes > kMaxRowBytes) {
    return absl::InvalidArgumentError(
        absl::StrCat("chunk_bytes: expected 1 to ", kMaxRowBytes, ", got ", options->chunk_bytes));
  }
  if (options->retry.max_attempts < 1) {
    return absl::InvalidArgumentError(
        absl::StrCat("retry.max_attempts: expected at least 1, got ", options->retry.max_attempts));
  }
  if (options->connect_timeout < absl::Milliseconds(1) ||
      options->connect_timeout > absl::Hours(1)) {
    return absl::InvalidArgumentError("connect_timeout: expected 1 ms to 1 h");
  }
  if (!options->sleep) options->sleep = SleepUnlessStopped;
  return grpc::CreateCustomChannel(options->address, grpc::InsecureChannelCredentials(),
                                   ArgumentsFor(*options));
}

}  // namespace certiq
