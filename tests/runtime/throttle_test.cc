#include "runtime/throttle.h"

#include <gtest/gtest.h>

namespace certiq::server {
namespace {

using engine::Phase;

TEST(ProgressGateTest, OfOnePhaseSomePasses) {
  ProgressGate gate;
  const ProgressGate::Clock::time_point start;
  const auto interval = ProgressGate::kInterval;
  EXPECT_TRUE(gate.Passes(Phase::kRound, start));
  EXPECT_FALSE(gate.Passes(Phase::kRound, start));
  EXPECT_FALSE(gate.Passes(Phase::kRound, start + interval / 2));
  EXPECT_TRUE(gate.Passes(Phase::kRound, start + interval));
  EXPECT_FALSE(gate.Passes(Phase::kRound, start + interval + interval / 2));
}

TEST(ProgressGateTest, EveryNewPhasePasses) {
  ProgressGate gate;
  const ProgressGate::Clock::time_point start;
  EXPECT_TRUE(gate.Passes(Phase::kFactor, start));
  EXPECT_TRUE(gate.Passes(Phase::kRound, start));
  EXPECT_TRUE(gate.Passes(Phase::kFactor, start));
  EXPECT_FALSE(gate.Passes(Phase::kFactor, start));
}

}  // namespace
}  // namespace certiq::server
