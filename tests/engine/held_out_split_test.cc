#include "engine/gram/held_out_split.h"

#include <gtest/gtest.h>

namespace certiq::engine {
namespace {

TEST(HeldOutSplitTest, HoldsOutWholeBlocksInTheRightShare) {
  for (const double fraction : {0.05, 0.125, 0.3, 0.5}) {
    const HeldOutSplit split(fraction, 16, "rank-3");
    int64_t held = 0;
    constexpr int64_t kBlocks = 4000;
    for (int64_t block = 0; block < kBlocks; ++block) {
      const bool first = split.IsHeldOut(block * 16);
      for (int64_t row = 1; row < 16; ++row) {
        ASSERT_EQ(split.IsHeldOut(block * 16 + row), first);
      }
      held += first ? 1 : 0;
    }
    // Neighbouring strata may name the same block when 1 / fraction is no whole number.
    EXPECT_LE(held, fraction * kBlocks + 1);
    EXPECT_GE(held, 0.8 * fraction * kBlocks);
  }
}

TEST(HeldOutSplitTest, EveryStratumOfEightBlocksLosesExactlyOne) {
  const HeldOutSplit split(0.125, 256, "");
  for (int64_t stratum = 0; stratum < 200; ++stratum) {
    int held = 0;
    for (int64_t b = 0; b < 8; ++b) held += split.IsHeldOut((stratum * 8 + b) * 256) ? 1 : 0;
    EXPECT_EQ(held, 1) << stratum;
  }
}

TEST(HeldOutSplitTest, StreamsDifferAndNothingIsHeldOutByDefault) {
  const HeldOutSplit a(0.125, 1, "a");
  const HeldOutSplit b(0.125, 1, "b");
  int differ = 0;
  for (int64_t row = 0; row < 800; ++row) {
    differ += a.IsHeldOut(row) != b.IsHeldOut(row) ? 1 : 0;
    EXPECT_FALSE(HeldOutSplit().IsHeldOut(row));
    EXPECT_FALSE(HeldOutSplit(0, 256, "a").IsHeldOut(row));
  }
  EXPECT_GT(differ, 50);
}

TEST(HeldOutSplitTest, ShortStreamsHaveShortBlocks) {
  EXPECT_EQ(HeldOutBlockRows(1 << 20, 0.125, 0), 256);
  EXPECT_EQ(HeldOutBlockRows(512, 0.125, 0), 8);
  EXPECT_EQ(HeldOutBlockRows(3, 0.125, 0), 1);
  EXPECT_EQ(HeldOutBlockRows(3, 0.125, 128), 128);
  const HeldOutSplit split(0.125, HeldOutBlockRows(512, 0.125, 0), "");
  int64_t held = 0;
  for (int64_t row = 0; row < 512; ++row) held += split.IsHeldOut(row) ? 1 : 0;
  EXPECT_EQ(held, 64);
}

}  // namespace
}  // namespace certiq::engine
