#include "retry_loop.h"

#include <optional>
#include <string>

#include "absl/strings/match.h"
#include "absl/strings/str_format.h"
#include "base/status_macros.h"
#include "certiq/status.h"

namespace certiq {

RetryLoop::RetryLoop(const ClientOptions& settings, const CallOptions& options)
    : settings_(settings),
      options_(options),
      deadline_(options.timeout == absl::InfiniteDuration() ? absl::InfiniteFuture()
                                                            : absl::Now() + options.timeout),
      backoff_(settings.retry) {}

absl::Status RetryLoop::Next(const AttemptOutcome& outcome) {
  // A try that the caller cancelled may end with any status.
  if (options_.cancel.stop_requested()) return absl::CancelledError("cancelled by the caller");

  const std::optional<absl::Duration> delay = backoff_.NextDelay(outcome);
  const int attempts = backoff_.attempts();
  if (!delay.has_value()) {
    return attempts == 1 ? outcome.status
                         : WithSuffix(outcome.status, absl::StrFormat(" (%d tries)", attempts));
  }
  if (absl::Now() + *delay >= deadline_) {
    return WithSuffix(outcome.status, absl::StrFormat(" (%d tries; the next one would come after "
                                                      "the deadline)",
                                                      attempts));
  }
  if (options_.progress) {
    options_.progress(RetryNotice{.error = outcome.status, .attempt = attempts, .delay = *delay});
  }
  if (!settings_.sleep(*delay, options_.cancel)) {
    return absl::CancelledError("cancelled by the caller");
  }
  return absl::OkStatus();
}

absl::Status RunRetryLoop(const ClientOptions& settings, const CallOptions& options,
                          const std::function<AttemptOutcome(absl::Time)>& attempt) {
  RetryLoop loop(settings, options);
  for (;;) {
    const AttemptOutcome outcome = attempt(loop.deadline());
    if (outcome.status.ok()) return absl::OkStatus();
    RETURN_IF_ERROR(loop.Next(outcome));
  }
}

CallContext::CallContext(absl::Time deadline, const std::stop_token& cancel)
    : cancel_(cancel, [this] { context_.TryCancel(); }) {
  if (deadline != absl::InfiniteFuture()) context_.set_deadline(absl::ToChronoTime(deadline));
}

AttemptOutcome CallContext::Outcome(const grpc::Status& status, bool exchanged) const {
  // A server that rejects before it reads anything leaves neither a write nor a read behind; but
  // once there is a connection, the peer has an address family.
  const std::string peer = context_.peer();
  AttemptOutcome outcome;
  outcome.status = FromGrpcStatus(status);
  outcome.reached_server = exchanged || status.error_code() != grpc::StatusCode::UNAVAILABLE ||
                           absl::StartsWith(peer, "ipv4:") || absl::StartsWith(peer, "ipv6:");
  outcome.elapsed = absl::Now() - start_;
  return outcome;
}

}  // namespace certiq
