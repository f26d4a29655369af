#include "runtime/byte_budget.h"

#include <gtest/gtest.h>

#include <optional>
#include <thread>
#include <utility>
#include <vector>

#include "base/memory_limit.h"
#include "base/status.h"
#include "support/text.h"

namespace certiq::server {
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
  EXPECT_EQ(base::RetryAfterOf(refused.status()), base::kRetrySoon);
  EXPECT_EQ(budget.reserved(), 70);
}

TEST(ByteBudgetTest, WhatNeverFitsIsSaidToNeverFit) {
  ByteBudget budget(100);
  const auto refused = budget.TryReserve(101, "this layer");
  ASSERT_TRUE(absl::IsResourceExhausted(refused.status()));
  EXPECT_CONTAINS(refused.status().message(), "cannot fit");
  EXPECT_EQ(base::RetryAfterOf(refused.status()), std::nullopt);
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
  EXPECT_EQ(base::RetryAfterOf(refused), std::nullopt);
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

TEST(ByteBudgetTest, RoomOfItsOwnIsNotThatOfTheWhole) {
  ByteBudget whole(100);
  ByteBudget share(40, whole, "this tenant's memory");
  const auto others = whole.TryReserve(90, "others");
  ASSERT_TRUE(others.ok());
  EXPECT_TRUE(share.HasRoomOfItsOwn(40));
  EXPECT_FALSE(share.HasRoomOfItsOwn(41));
  const auto own = share.TryReserve(10, "this job");
  ASSERT_TRUE(own.ok());
  EXPECT_TRUE(share.HasRoomOfItsOwn(30));
  EXPECT_FALSE(share.HasRoomOfItsOwn(31));
}

TEST(ByteBudgetTest, AShareTakesFromTheWhole) {
  ByteBudget whole(100);
  ByteBudget share(60, whole, "this tenant's quota");
  auto held = share.TryReserve(50, "this layer");
  ASSERT_TRUE(held.ok());
  EXPECT_EQ(whole.reserved(), 50);
  EXPECT_CONTAINS(share.TryReserve(11, "this layer").status().message(),
                  "10 of this tenant's quota of 60");
  const auto others = whole.TryReserve(45, "others");
  ASSERT_TRUE(others.ok());
  // The bytes fit the part but not the whole: both stay as they were.
  EXPECT_CONTAINS(held->Resize(56, "this layer").message(), "5 of the budget of 100");
  EXPECT_EQ(share.reserved(), 50);
  EXPECT_TRUE(held->Resize(55, "this layer").ok());
  held->Release();
  EXPECT_EQ(share.reserved(), 0);
  EXPECT_EQ(whole.reserved(), 45);
}

TEST(ByteBudgetTest, SaysWhatCanNeverFit) {
  ByteBudget whole(100);
  ByteBudget share(60, whole, "this tenant's quota");
  ByteBudget wide(500, whole, "this tenant's quota");
  const auto held = whole.TryReserve(100, "others");
  EXPECT_TRUE(share.CheckCanFit(60, "this job").ok());
  EXPECT_CONTAINS(share.CheckCanFit(61, "this job").message(), "this tenant's quota of 60");
  const absl::Status refused = wide.CheckCanFit(101, "this job");
  EXPECT_CONTAINS(refused.message(), "the budget of 100");
  EXPECT_EQ(base::RetryAfterOf(refused), std::nullopt);
}

TEST(ByteBudgetTest, AShareThatIsFullSaysWhatTheWholeCanNeverHold) {
  ByteBudget whole(100);
  ByteBudget wide(500, whole, "this tenant's quota");
  const auto held = wide.Reserve(480);
  const auto never = wide.TryReserve(101, "this job");
  EXPECT_CONTAINS(never.status().message(), "cannot fit");
  EXPECT_EQ(base::RetryAfterOf(never.status()), std::nullopt);
  EXPECT_EQ(base::RetryAfterOf(wide.TryReserve(100, "this job").status()), base::kRetrySoon);
}

TEST(ByteBudgetTest, WhatIsThereAlreadyMayPassTheCapacity) {
  ByteBudget whole(100);
  ByteBudget share(60, whole, "this tenant's quota");
  {
    const auto found = share.Reserve(130);
    EXPECT_EQ(whole.reserved(), 130);
    EXPECT_CONTAINS(share.TryReserve(1, "this job").status().message(), "; 0 of");
    EXPECT_CONTAINS(whole.TryReserve(1, "this job").status().message(), "; 0 of");
    EXPECT_TRUE(absl::IsResourceExhausted(share.TryReserve(INT64_MAX, "this job").status()));
  }
  EXPECT_EQ(share.reserved(), 0);
  EXPECT_EQ(whole.reserved(), 0);
}

TEST(ByteBudgetTest, AsksForWhatNobodyNeeds) {
  ByteBudget whole(100);
  ByteBudget share(1000, whole, "this tenant's quota");
  auto cache = *whole.TryReserve(80, "a cache");
  int64_t asked = 0;
  whole.SetReclaimer([&](int64_t bytes) {
    asked += bytes;
    cache.ShrinkTo(40);
  });
  EXPECT_TRUE(share.TryReserve(20, "this layer").ok());
  EXPECT_EQ(asked, 0);
  {
    const auto held = share.TryReserve(60, "this layer");
    EXPECT_TRUE(held.ok());
    EXPECT_EQ(asked, 60);
    EXPECT_FALSE(share.TryReserve(10, "this layer").ok());
    EXPECT_EQ(share.reserved(), 60);
  }
  EXPECT_EQ(whole.reserved(), 40);
}

TEST(ByteBudgetTest, TellsWhenBytesComeBack) {
  ByteBudget whole(100);
  ByteBudget share(60, whole, "this tenant's quota");
  int told = 0;
  int64_t left = -1;
  whole.SetReleased([&] {
    ++told;
    left = whole.reserved();
  });
  auto held = *share.TryReserve(50, "this layer");
  EXPECT_EQ(told, 0);
  held.ShrinkTo(20);
  EXPECT_EQ(told, 1);
  EXPECT_EQ(left, 20);
  held.Release();
  EXPECT_EQ(told, 2);
  EXPECT_EQ(left, 0);
}

TEST(StatusDetailsTest, NoDelayWhereNoneWasSet) {
  EXPECT_EQ(base::RetryAfterOf(absl::OkStatus()), std::nullopt);
  EXPECT_EQ(base::RetryAfterOf(absl::InternalError("x")), std::nullopt);
}

TEST(MemoryLimitTest, IsPlausible) {
  EXPECT_GT(base::MemoryLimitBytes(), int64_t{16} << 20);
  EXPECT_LT(base::MemoryLimitBytes(), int64_t{1} << 50);
}

}  // namespace
}  // namespace certiq::server
