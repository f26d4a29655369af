#include "certiq/retry.h"

#include <algorithm>
#include <chrono>
#include <condition_variable>
#include <mutex>

#include "absl/random/distributions.h"
#include "certiq/status.h"

namespace certiq {

bool SleepUnlessStopped(absl::Duration duration, const std::stop_token& stop) {
  std::mutex mutex;
  std::condition_variable_any stopped;
  std::unique_lock lock(mutex);
  const auto until = std::chrono::steady_clock::now() + absl::ToChronoNanoseconds(duration);
  stopped.wait_until(lock, stop, until, [] { return false; });
  return !stop.stop_requested();
}

std::optional<absl::Duration> Backoff::NextDelay(const AttemptOutcome& outcome) {
  if (outcome.progressed) {
    attempts_ = 0;
    unreachable_ = stuck_ = absl::ZeroDuration();
  }
  ++attempts_;
  if (outcome.status.ok() || outcome.local || outcome.result_started) return std::nullopt;

  const std::optional<absl::Duration> server_delay = DetailsOf(outcome.status).retry_delay;
  const bool unavailable = absl::IsUnavailable(outcome.status);
  const bool exhausted = absl::IsResourceExhausted(outcome.status) && server_delay.has_value();
  if (!unavailable && !exhausted) return std::nullopt;
  if (server_delay.has_value() && *server_delay > policy_.max_server_delay) return std::nullopt;

  absl::Duration step = policy_.initial_backoff;
  for (int i = 1; i < attempts_ && step < policy_.max_backoff; ++i) step *= policy_.multiplier;
  step = std::min(step, policy_.max_backoff);
  absl::Duration delay = step * absl::Uniform(random_, 0.5, 1.0);
  if (server_delay.has_value()) {
    // The jitter comes on top: earlier than asked would only be rejected again.
    delay = *server_delay + std::min(delay, *server_delay / 4);
  }
  if (!MayRepeat(outcome, delay)) return std::nullopt;
  return delay;
}

bool Backoff::MayRepeat(const AttemptOutcome& outcome, absl::Duration delay) {
  if (outcome.resumable) {
    // What a try that got further took was no waste.
    stuck_ += delay + (outcome.progressed ? absl::ZeroDuration() : outcome.elapsed);
    return stuck_ <= policy_.resume_budget;
  }
  if (attempts_ >= policy_.max_attempts) return false;
  if (outcome.reached_server) return true;
  unreachable_ += outcome.elapsed + delay;
  return unreachable_ <= policy_.unreachable_budget;
}

}  // namespace certiq
