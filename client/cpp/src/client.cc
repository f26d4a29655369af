#include "certiq/client.h"

#include <algorithm>
#include <string>
#include <utility>

#include "absl/strings/match.h"
#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "absl/strings/string_view.h"
#include "absl/strings/strip.h"
#include "certiq/status.h"
#include "certiq/v1/quantization_service.grpc.pb.h"
#include "channel.h"
#include "quantize_call.h"
#include "request_check.h"

namespace certiq {
namespace {

absl::string_view HostOf(absl::string_view address) {
  absl::string_view host = address.substr(0, address.rfind(':'));
  absl::ConsumePrefix(&host, "[");
  absl::ConsumeSuffix(&host, "]");
  return host;
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

struct Client::Connection {
  ClientOptions options;
  std::unique_ptr<v1::QuantizationService::Stub> stub;
};

Client::Client(std::unique_ptr<Connection> connection) : connection_(std::move(connection)) {}
Client::~Client() = default;

absl::StatusOr<std::unique_ptr<Client>> Client::Create(ClientOptions options) {
  if (absl::Status status = CheckAddress(options.address); !status.ok()) return status;
  if (options.chunk_bytes < 1 || options.chunk_bytes > kMaxRowBytes) {
    return absl::InvalidArgumentError(
        absl::StrCat("chunk_bytes: expected 1 to ", kMaxRowBytes, ", got ", options.chunk_bytes));
  }
  if (options.retry.max_attempts < 1) {
    return absl::InvalidArgumentError(
        absl::StrCat("retry.max_attempts: expected at least 1, got ", options.retry.max_attempts));
  }
  if (options.connect_timeout < absl::Milliseconds(1) || options.connect_timeout > absl::Hours(1)) {
    return absl::InvalidArgumentError("connect_timeout: expected 1 ms to 1 h");
  }
  if (!options.sleep) options.sleep = SleepUnlessStopped;
  const absl::StatusOr<std::shared_ptr<grpc::Channel>> channel = MakeChannel(options);
  if (!channel.ok()) return channel.status();
  auto connection = std::make_unique<Connection>();
  connection->stub = v1::QuantizationService::NewStub(*channel);
  connection->options = std::move(options);
  return std::unique_ptr<Client>(new Client(std::move(connection)));
}

absl::StatusOr<QuantizeResult> Client::Quantize(const QuantizeRequestData& request,
                                                const QuantizeOptions& options) const {
  if (absl::Status status = CheckRequest(request); !status.ok()) return status;
  const ClientOptions& settings = connection_->options;
  const absl::Time deadline = options.timeout == absl::InfiniteDuration()
                                  ? absl::InfiniteFuture()
                                  : absl::Now() + options.timeout;
  Backoff backoff(settings.retry);
  for (;;) {
    QuantizeResult result;
    QuantizeCall call(connection_->stub.get(), request, options, settings.chunk_bytes);
    const AttemptOutcome outcome = call.Run(deadline, &result);
    if (outcome.status.ok()) return result;
    // Whatever the try ended with, it ended because the caller wanted it to.
    if (options.cancel.stop_requested()) return absl::CancelledError("cancelled by the caller");

    const std::optional<absl::Duration> delay = backoff.NextDelay(outcome);
    const int attempts = backoff.attempts();
    if (!delay.has_value()) {
      return attempts == 1 ? outcome.status
                           : WithSuffix(outcome.status, absl::StrFormat(" (%d tries)", attempts));
    }
    if (absl::Now() + *delay >= deadline) {
      return WithSuffix(outcome.status, absl::StrFormat(" (%d tries; the next one would come after "
                                                        "the deadline)",
                                                        attempts));
    }
    if (options.progress) {
      options.progress(RetryNotice{.error = outcome.status, .attempt = attempts, .delay = *delay});
    }
    if (!settings.sleep(*delay, options.cancel)) {
      return absl::CancelledError("cancelled by the caller");
    }
  }
}

}  // namespace certiq
