// Retry policy: which failed calls are repeated, and after which wait.
#ifndef CERTIQ_CLIENT_CPP_INCLUDE_CERTIQ_RETRY_H_
#define CERTIQ_CLIENT_CPP_INCLUDE_CERTIQ_RETRY_H_

#include <functional>
#include <optional>
#include <stop_token>

#include "absl/random/random.h"
#include "absl/status/status.h"
#include "absl/time/time.h"

namespace certiq {

struct RetryPolicy {
  // Tries in all; 1 never repeats.
  int max_attempts = 4;
  // The wait after try k, k = 1, 2, …, is drawn from [1/2, 1] of
  // min(max_backoff, initial_backoff * multiplier^(k-1)), so that clients that failed together do
  // not come back together.
  absl::Duration initial_backoff = absl::Milliseconds(400);
  absl::Duration max_backoff = absl::Seconds(10);
  double multiplier = 2;
  // A server that asks for a longer wait than this is not waited for.
  absl::Duration max_server_delay = absl::Seconds(60);
  // How long a server that nobody could reach is tried for: attempts and waits together.
  absl::Duration unreachable_budget = absl::Seconds(2);
  // How long a stream that was open once is tried without getting further: attempts and waits
  // together. A server that restarts needs more time than a wrong address deserves.
  absl::Duration resume_budget = absl::Minutes(2);
};

// How one attempt ended.
struct AttemptOutcome {
  absl::Status status = {};
  // Whether a message was sent to or came from a server.
  bool reached_server = false;
  // Whether a part of the result came, which only the caller may ask for again.
  bool result_started = false;
  // The error was found here, in what the server sent: it would do so again.
  bool local = false;
  // It goes on from where it broke: resume_budget holds instead of max_attempts and
  // unreachable_budget.
  bool resumable = false;
  // It got further than every try before: the counts begin anew.
  bool progressed = false;
  absl::Duration elapsed = {};
};

// Waits, or returns false at once when the token is stopped, during the wait too.
using Sleeper = std::function<bool(absl::Duration, const std::stop_token&)>;

// The default Sleeper of a client. Thread-safe.
bool SleepUnlessStopped(absl::Duration duration, const std::stop_token& stop);

// The retry decisions of one call. Not thread-safe.
class Backoff {
 public:
  explicit Backoff(const RetryPolicy& policy) : policy_(policy) {}

  // The wait before the next try; nullopt: give up. UNAVAILABLE is repeated, RESOURCE_EXHAUSTED
  // only with RetryInfo (without it, it means a message that is too large and always will be). A
  // wait is never shorter than RetryInfo's.
  std::optional<absl::Duration> NextDelay(const AttemptOutcome& outcome);

  // Tries that NextDelay was told of since the last one that got further.
  int attempts() const { return attempts_; }

 private:
  // Within the budgets, which `delay` uses up.
  bool MayRepeat(const AttemptOutcome& outcome, absl::Duration delay);

  RetryPolicy policy_;
  absl::BitGen random_;
  int attempts_ = 0;
  absl::Duration unreachable_;
  absl::Duration stuck_;
};

}  // namespace certiq

#endif  // CERTIQ_CLIENT_CPP_INCLUDE_CERTIQ_RETRY_H_
