#include "jobs/byte_budget.h"

#include <gtest/gtest.h>

#include <thread>
#include <utility>
#include <vector>

#include "jobs/memory_limit.h"
#include "jobs/status_details.h"
#include "support/text.h"

namespace certiq::jobs {
namespace {

TEST(ByteBudgetTest, ReservationReturnsItsBytes) {
  ByteBudget budget(100);
  {
    auto reservation = budget.TryReserve(60, "this layer");
    ASSERT_TRUE(reservation.ok());
    EXPECT_EQ(reservation->bytes(), 60);
    EXPECT_EQ(budget.reserved(), 60);
  }
  EXPECT_EQ(budget.reserved(), 0);
}

TEST(ByteBudgetTest, MovedReservationReturnsItsBytesOnce) {
  ByteBudget budget(100);
  auto first = budget.TryReserve(60, "this layer");
  ASSERT_TRUE(first.ok());
  ByteBudget::Reservation second = *std::move(first);
  ByteBudget::Reservation third;
  third = std::move(second);
  EXPECT_EQ(budget.reserved(), 60);
  EXPECT_EQ(third.bytes(), 60);
  third = ByteBudget::Reservation();
  EXPECT_EQ(budget.reserved(), 0);
}

TEST(ByteBudgetTest, FullBudgetSaysWhatIsFreeAndWhenToComeBack) {
  ByteBudget budget(100);
  const auto held = budget.TryReserve(70, "this layer");
  const auto refused = budget.TryReserve(40, "this layer");
  ASSERT_TRUE(absl::IsResourceExhausted(refused.status()));
  const std::string message(refused.status().message());
  EXPECT_CONTAINS(message, "40 bytes");
  EXPECT_CONTAINS(message, "30 of the budget of 100");
  EXPECT_EQ(RetryAfterOf(refused.status()), kRetrySoon);
  EXPECT_EQ(budget.reserved(), 70);
}

TEST(ByteBudgetTest, WhatNeverFitsIsSaidToNeverFit) {
  ByteBudget budget(100);
  const auto refused = budget.TryReserve(101, "this layer");
  ASSERT_TRUE(absl::IsResourceExhausted(refused.status()));
  EXPECT_CONTAINS(refused.status().message(), "cannot fit");
  EXPECT_EQ(RetryAfterOf(refused.status()), kRetryLate);
}

TEST(ByteBudgetTest, ExactFitIsTaken) {
  ByteBudget budget(100);
  const auto held = budget.TryReserve(100, "this layer");
  EXPECT_TRUE(held.ok());
  EXPECT_FALSE(budget.TryReserve(1, "this layer").ok());
  EXPECT_TRUE(budget.TryReserve(0, "this layer").ok());
}

TEST(ByteBudgetTest, HugeAskDoesNotOverflow) {
  ByteBudget budget(100);
  const auto held = budget.TryReserve(100, "this layer");
  EXPECT_FALSE(budget.TryReserve(INT64_MAX, "this layer").ok());
}

TEST(ByteBudgetTest, ResizeGrowsAndShrinks) {
  ByteBudget budget(100);
  auto reservation = budget.TryReserve(10, "this layer");
  ASSERT_TRUE(reservation.ok());
  EXPECT_TRUE(reservation->Resize(90, "this layer").ok());
  EXPECT_EQ(budget.reserved(), 90);
  const absl::Status refused = reservation->Resize(110, "this layer");
  EXPECT_TRUE(absl::IsResourceExhausted(refused));
  EXPECT_EQ(RetryAfterOf(refused), kRetryLate);
  EXPECT_EQ(reservation->bytes(), 90);
  EXPECT_TRUE(reservation->Resize(5, "this layer").ok());
  EXPECT_EQ(budget.reserved(), 5);
  reservation->ShrinkTo(50);
  EXPECT_EQ(reservation->bytes(), 5);
}

TEST(ByteBudgetTest, TellsTheObserver) {
  struct Watcher : Observer {
    void BudgetChanged(int64_t now_reserved, int64_t now_capacity) override {
      reserved = now_reserved;
      capacity = now_capacity;
    }
    int64_t reserved = -1;
    int64_t capacity = -1;
  } watcher;
  ByteBudget budget(100, watcher);
  EXPECT_EQ(watcher.reserved, 0);
  EXPECT_EQ(watcher.capacity, 100);
  auto reservation = budget.TryReserve(10, "this layer");
  EXPECT_EQ(watcher.reserved, 10);
  reservation->Release();
  EXPECT_EQ(watcher.reserved, 0);
}

TEST(ByteBudgetTest, ThreadsNeverPassTheCapacity) {
  ByteBudget budget(10);
  std::vector<std::thread> threads;
  threads.reserve(4);
  for (int t = 0; t < 4; ++t) {
    threads.emplace_back([&budget] {
      for (int i = 0; i < 2000; ++i) {
        const auto reservation = budget.TryReserve(3, "this layer");
        EXPECT_LE(budget.reserved(), 10);
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
  EXPECT_EQ(budget.reserved(), 0);
}

TEST(StatusDetailsTest, NoDelayWhereNoneWasSet) {
  EXPECT_EQ(RetryAfterOf(absl::OkStatus()), std::nullopt);
  EXPECT_EQ(RetryAfterOf(absl::InternalError("x")), std::nullopt);
}

TEST(MemoryLimitTest, IsPlausible) {
  EXPECT_GT(MemoryLimitBytes(), int64_t{16} << 20);
  EXPECT_LT(MemoryLimitBytes(), int64_t{1} << 50);
}

}  // namespace
}  // namespace certiq::jobs
