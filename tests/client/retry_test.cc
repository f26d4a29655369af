#include "certiq/retry.h"

#include <optional>
#include <stop_token>
#include <thread>

#include "certiq/status.h"
#include "fake_server.h"
#include "gtest/gtest.h"

namespace certiq {
namespace {

using testing::BusyStatus;

AttemptOutcome Outcome(const absl::Status& status) {
  return {.status = status, .reached_server = true, .elapsed = absl::ZeroDuration()};
}

AttemptOutcome Busy(absl::Duration delay) { return Outcome(FromGrpcStatus(BusyStatus(delay))); }

TEST(BackoffTest, GrowsWithJitterUpToItsCapAndTries) {
  const RetryPolicy policy{.max_attempts = 6,
                           .initial_backoff = absl::Seconds(1),
                           .max_backoff = absl::Seconds(5),
                           .multiplier = 2};
  Backoff backoff(policy);
  for (const double seconds : {1.0, 2.0, 4.0, 5.0, 5.0}) {
    const auto delay = backoff.NextDelay(Outcome(absl::UnavailableError("")));
    ASSERT_TRUE(delay.has_value());
    EXPECT_GE(*delay, absl::Seconds(seconds / 2));
    EXPECT_LE(*delay, absl::Seconds(seconds));
  }
  EXPECT_EQ(backoff.NextDelay(Outcome(absl::UnavailableError(""))), std::nullopt);
  EXPECT_EQ(backoff.attempts(), 6);
}

TEST(BackoffTest, JitterTellsClientsApart) {
  Backoff one{RetryPolicy()};
  Backoff other{RetryPolicy()};
  EXPECT_NE(one.NextDelay(Outcome(absl::UnavailableError(""))),
            other.NextDelay(Outcome(absl::UnavailableError(""))));
}

TEST(BackoffTest, NeverComesBackEarlierThanAsked) {
  for (int trial = 0; trial < 50; ++trial) {
    Backoff backoff{RetryPolicy()};
    const auto delay = backoff.NextDelay(Busy(absl::Seconds(8)));
    ASSERT_TRUE(delay.has_value());
    EXPECT_GE(*delay, absl::Seconds(8));
    EXPECT_LE(*delay, absl::Seconds(10));
  }
}

TEST(BackoffTest, GivesUpWhenAskedToWaitForTooLong) {
  Backoff backoff{RetryPolicy()};
  EXPECT_EQ(backoff.NextDelay(Busy(absl::Seconds(61))), std::nullopt);
  EXPECT_EQ(Backoff{RetryPolicy()}.NextDelay(Busy(absl::InfiniteDuration())), std::nullopt);
}

TEST(BackoffTest, RepeatsNothingElse) {
  for (int code = 0; code <= 16; ++code) {
    const absl::Status status(static_cast<absl::StatusCode>(code), "");
    Backoff backoff{RetryPolicy()};
    EXPECT_EQ(backoff.NextDelay(Outcome(status)).has_value(), absl::IsUnavailable(status)) << code;
  }
}

TEST(BackoffTest, RepeatsNoStartedResultAndNothingFoundHere) {
  AttemptOutcome outcome = Outcome(absl::UnavailableError(""));
  outcome.result_started = true;
  EXPECT_EQ(Backoff{RetryPolicy()}.NextDelay(outcome), std::nullopt);
  outcome.result_started = false;
  outcome.local = true;
  EXPECT_EQ(Backoff{RetryPolicy()}.NextDelay(outcome), std::nullopt);
}

TEST(BackoffTest, SpendsLittleOnAServerNobodyReaches) {
  AttemptOutcome outcome = Outcome(absl::UnavailableError(""));
  outcome.reached_server = false;
  outcome.elapsed = absl::Milliseconds(900);
  RetryPolicy policy;
  policy.max_attempts = 100;
  Backoff backoff(policy);
  absl::Duration spent;
  while (const auto delay = backoff.NextDelay(outcome)) spent += outcome.elapsed + *delay;
  EXPECT_LE(spent, absl::Seconds(2));
  // One that answers is not held to that budget.
  outcome.reached_server = true;
  EXPECT_TRUE(backoff.NextDelay(outcome).has_value());
}

TEST(SleepTest, EndsAtOnceWhenStopped) {
  std::stop_source source;
  EXPECT_TRUE(SleepUnlessStopped(absl::Milliseconds(1), source.get_token()));
  const absl::Time start = absl::Now();
  const std::jthread stopper([&source] { source.request_stop(); });
  EXPECT_FALSE(SleepUnlessStopped(absl::Hours(1), source.get_token()));
  EXPECT_FALSE(SleepUnlessStopped(absl::Hours(1), source.get_token()));
  EXPECT_LT(absl::Now() - start, absl::Minutes(1));
}

TEST(BackoffTest, StreamsThatWereOpenAreTriedForLonger) {
  RetryPolicy policy;
  policy.max_attempts = 1;
  Backoff backoff(policy);
  AttemptOutcome outcome;
  outcome.status = absl::UnavailableError("gone");
  outcome.resumable = true;
  absl::Duration waited;
  int tries = 0;
  while (const auto delay = backoff.NextDelay(outcome)) {
    waited += *delay;
    ++tries;
  }
  EXPECT_GT(tries, 10);
  EXPECT_GT(waited, policy.resume_budget - policy.max_backoff);
  EXPECT_LE(waited, policy.resume_budget);
  // Getting further begins anew, with short waits.
  outcome.progressed = true;
  const auto delay = backoff.NextDelay(outcome);
  ASSERT_TRUE(delay.has_value());
  EXPECT_LE(*delay, policy.initial_backoff);
  EXPECT_EQ(backoff.attempts(), 1);
}

}  // namespace
}  // namespace certiq
