// Retry loop of one call, and the context of each try.
#ifndef CERTIQ_CLIENT_CPP_SRC_RETRY_LOOP_H_
#define CERTIQ_CLIENT_CPP_SRC_RETRY_LOOP_H_

#include <functional>
#include <stop_token>

#include "absl/status/status.h"
#include "absl/time/time.h"
#include "certiq/client.h"
#include "certiq/retry.h"
#include "grpcpp/client_context.h"
#include "grpcpp/support/status.h"

namespace certiq {

// Decides after each failed try whether another one follows, and waits for it. Not thread-safe. The
// arguments must outlive it.
class RetryLoop {
 public:
  RetryLoop(const ClientOptions& settings, const CallOptions& options);

  // The deadline of the whole call.
  absl::Time deadline() const { return deadline_; }

  // Reports to the caller's progress function and waits. Returns OK for another try, otherwise the
  // status that the call ends with: that of the try, with the number of tries, or CANCELLED.
  // REQUIRES: !outcome.status.ok().
  absl::Status Next(const AttemptOutcome& outcome);

 private:
  const ClientOptions& settings_;
  const CallOptions& options_;
  const absl::Time deadline_;
  Backoff backoff_;
};

// `attempt` gets the deadline of the whole call; it is called until it succeeds or RetryLoop gives
// up.
absl::Status RunRetryLoop(const ClientOptions& settings, const CallOptions& options,
                          const std::function<AttemptOutcome(absl::Time)>& attempt);

// The gRPC context of one try. Not thread-safe but for what gRPC allows with a context.
class CallContext {
 public:
  // Stopping `cancel`, now or later, cancels the call.
  CallContext(absl::Time deadline, const std::stop_token& cancel);
  CallContext(const CallContext&) = delete;
  CallContext& operator=(const CallContext&) = delete;

  grpc::ClientContext* get() { return &context_; }

  // How the try ended by its status. `exchanged`: a message was sent or came.
  AttemptOutcome Outcome(const grpc::Status& status, bool exchanged) const;

 private:
  const absl::Time start_ = absl::Now();
  grpc::ClientContext context_;
  // Declared last, so that no callback runs on a context that is gone.
  std::stop_callback<std::function<void()>> cancel_;
};

}  // namespace certiq

#endif  // CERTIQ_CLIENT_CPP_SRC_RETRY_LOOP_H_
