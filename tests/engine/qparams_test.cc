#include "engine/scales/qparams.h"

#include <gtest/gtest.h>

#include <cmath>
#include <vector>

#include "base/status.h"
#include "tests/engine/problems.h"
#include "tests/engine/specs.h"

namespace certiq::engine {
namespace {

absl::StatusOr<Grid> GridOf(const textbook::Matrix& w, const ResolvedSpec& spec) {
  SerialExecutor serial;
  RunContext context;
  context.executor = &serial;
  const ResolvedSpec resolved = testing::Completed(spec);
  Grid grid = MakeGrid(resolved, w.rows, w.cols, {});
  FillQuantParams(resolved, testing::Strips(w), context, grid);
  if (absl::Status status = CheckScales(resolved, grid); !status.ok()) return status;
  return grid;
}

TEST(GridTest, StopsSearchingWhenCancelled) {
  const auto w = testing::MakeLayer(1, 100, 37, testing::Inputs::kGaussian, 43).w;
  ResolvedSpec spec;
  spec.scale = ScaleRule::kMse;
  SerialExecutor serial;
  Cancellation cancellation;
  cancellation.Cancel(absl::StatusCode::kCancelled);
  RunContext context;
  context.executor = &serial;
  context.cancellation = &cancellation;
  const ResolvedSpec resolved = testing::Completed(spec);
  Grid grid = MakeGrid(resolved, w.rows, w.cols, {});
  const std::vector<float> empty = grid.scale;
  FillQuantParams(resolved, testing::Strips(w), context, grid);
  EXPECT_EQ(grid.scale, empty);
}

TEST(GridTest, MatchesTextbookForEveryWidthAndGrouping) {
  const auto w = testing::MakeLayer(1, 100, 37, testing::Inputs::kGaussian, 41).w;
  for (int bits = 2; bits <= 8; ++bits) {
    for (const bool symmetric : {true, false}) {
      for (const int group : {0, 8, 33, 50, 100, 400}) {
        ResolvedSpec spec;
        spec.bits = bits;
        spec.symmetric = symmetric;
        spec.group_size = group;
        const auto grid = GridOf(w, spec);
        ASSERT_TRUE(grid.ok()) << grid.status();
        for (int64_t r = 0; r < w.rows; ++r) {
          const auto truth = textbook::AbsmaxGrid(testing::Row(w, r), bits, symmetric, group);
          ASSERT_EQ(static_cast<size_t>(grid->groups), truth.scale.size());
          for (int64_t g = 0; g < grid->groups; ++g) {
            const auto at = static_cast<size_t>(r * grid->groups + g);
            ASSERT_EQ(grid->scale[at], truth.scale[static_cast<size_t>(g)]);
            ASSERT_EQ(grid->zero[at], truth.zero[static_cast<size_t>(g)]);
          }
        }
      }
    }
  }
}

TEST(GridTest, AbsmaxSitsHalfAStepBeyondTheTopLevel) {
  textbook::Matrix w(1, 2);
  w(0, 0) = 7.5;
  w(0, 1) = -1;
  const auto grid = GridOf(w, {});
  ASSERT_TRUE(grid.ok());
  EXPECT_EQ(grid->scale[0], 1.0f);
  EXPECT_EQ(grid->zero[0], 8);
}

TEST(GridTest, ZerosHaveScaleOneAndOneSidedRangesIncludeZero) {
  textbook::Matrix w(2, 2);
  w(1, 0) = 3;
  w(1, 1) = 15;
  ResolvedSpec spec;
  spec.symmetric = false;
  const auto grid = GridOf(w, spec);
  ASSERT_TRUE(grid.ok());
  EXPECT_EQ(grid->scale, (std::vector<float>{1, 1}));
  EXPECT_EQ(grid->zero, (std::vector<int32_t>{0, 0}));
}

TEST(GridTest, ScalesAreRoundedToTheirType) {
  textbook::Matrix w(1, 1);
  w(0, 0) = 1;
  ResolvedSpec spec;
  spec.scale_dtype = DType::kF16;
  const auto grid = GridOf(w, spec);
  ASSERT_TRUE(grid.ok());
  EXPECT_EQ(grid->scale[0], RoundTo(DType::kF16, 2.0f / 15));
  EXPECT_NE(grid->scale[0], 2.0f / 15);
}

TEST(GridTest, RefusesScalesThatPassTheirType) {
  textbook::Matrix w(2, 1);
  w(0, 0) = 1;
  w(1, 0) = 1e6;
  ResolvedSpec spec;
  spec.scale_dtype = DType::kF16;
  spec.group_size = 8;
  const auto grid = GridOf(w, spec);
  EXPECT_EQ(grid.status().code(), absl::StatusCode::kInvalidArgument);
  EXPECT_EQ(base::FieldOf(grid.status()), "spec.scale_dtype");
  EXPECT_NE(std::string(grid.status().message()).find("row 1, group 0"), std::string::npos)
      << grid.status();
}

TEST(GridTest, WhatItsTypeHoldsNoScaleForVanishes) {
  textbook::Matrix w(2, 1);
  w(0, 0) = 1;
  w(1, 0) = 1e-9;
  for (const bool symmetric : {true, false}) {
    ResolvedSpec spec;
    spec.scale_dtype = DType::kF16;
    spec.symmetric = symmetric;
    const auto grid = GridOf(w, spec);
    ASSERT_TRUE(grid.ok()) << grid.status();
    EXPECT_EQ(grid->vanishes, (std::vector<uint8_t>{0, 1}));
    EXPECT_EQ(grid->scale[1], 0x1p-14f);
    EXPECT_EQ(grid->zero[1], 8);
  }
}

}  // namespace
}  // namespace certiq::engine
