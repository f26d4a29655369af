#include "runtime/throttle.h"

#include <gtest/gtest.h>

namespace certiq::server {
namespace {

using engine::Phase;

TEST(ThrottleTest, OnePhaseIsAllowedOncePerInterval) {
  Throttle throttle;
  const Throttle::Clock::time_point start;
  const auto interval = Throttle::kInterval;
  EXPECT_TRUE(throttle.Allow(Phase::kRound, start));
  EXPECT_FALSE(throttle.Allow(Phase::kRound, start));
  EXPECT_FALSE(throttle.Allow(Phase::kRound, start + interval / 2));
  EXPECT_TRUE(throttle.Allow(Phase::kRound, start + interval));
  EXPECT_FALSE(throttle.Allow(Phase::kRound, start + interval + interval / 2));
}

TEST(ThrottleTest, EveryNewPhaseIsAllowed) {
  Throttle throttle;
  const Throttle::Clock::time_point start;
  EXPECT_TRUE(throttle.Allow(Phase::kFactor, start));
  EXPECT_TRUE(throttle.Allow(Phase::kRound, start));
  EXPECT_TRUE(throttle.Allow(Phase::kFactor, start));
  EXPECT_FALSE(throttle.Allow(Phase::kFactor, start));
}

}  // namespace
}  // namespace certiq::server
