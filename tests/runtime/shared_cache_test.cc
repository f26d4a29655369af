#include "runtime/shared_cache.h"

#include <gtest/gtest.h>

#include <atomic>
#include <memory>
#include <mutex>
#include <stdexcept>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "support/gate.h"

namespace certiq::server {
namespace {

using testing::Gate;

// A value; `alive` counts those that exist.
struct Counted {
  Counted(int number, std::atomic<int>& count) : value(number), alive(count) { ++alive; }
  Counted(const Counted&) = delete;
  Counted& operator=(const Counted&) = delete;
  ~Counted() { --alive; }

  const int value;
  std::atomic<int>& alive;
};

int ValueOf(const SharedCache::Found& found) {
  return static_cast<const Counted*>(found.value.get())->value;
}

class SharedCacheTest : public ::testing::Test {
 protected:
  std::function<absl::StatusOr<SharedCache::Value>()> Make(int value) {
    return [this, value]() -> absl::StatusOr<SharedCache::Value> {
      ++made_;
      return SharedCache::Value(std::make_shared<const Counted>(value, alive_));
    };
  }
  // Gets the value and drops it.
  bool Shared(SharedCache& cache, const std::string& key, int64_t bytes = 10) {
    const auto found = cache.Get(key, bytes, Make(1));
    EXPECT_TRUE(found.ok()) << found.status();
    return found.ok() && found->shared;
  }

  std::atomic<int> alive_{0};
  std::atomic<int> made_{0};
  ByteBudget budget_{1000};
  WorkerPool pool_{2, 4};
};

TEST_F(SharedCacheTest, KeepsAValueAndPaysForIt) {
  {
    SharedCache cache(pool_, budget_, 100);
    {
      const auto first = cache.Get("a", 10, Make(7));
      ASSERT_TRUE(first.ok());
      EXPECT_FALSE(first->shared);
      EXPECT_EQ(ValueOf(*first), 7);
      EXPECT_EQ(budget_.reserved(), 10);
    }
    const auto second = cache.Get("a", 10, Make(8));
    ASSERT_TRUE(second.ok());
    EXPECT_TRUE(second->shared);
    EXPECT_EQ(ValueOf(*second), 7);
    EXPECT_EQ(made_, 1);
  }
  EXPECT_EQ(alive_, 0);
  EXPECT_EQ(budget_.reserved(), 0);
}

TEST_F(SharedCacheTest, ManyAskAtOnceAndOneMakes) {
  constexpr int kThreads = 6;
  SharedCache cache(pool_, budget_, 100);
  Gate started;
  std::atomic<int> asking{0};
  std::atomic<int> own{0};
  std::vector<std::thread> threads;
  threads.reserve(kThreads);
  for (int t = 0; t < kThreads; ++t) {
    threads.emplace_back([&] {
      const auto make = [&]() -> absl::StatusOr<SharedCache::Value> {
        EXPECT_TRUE(started.Wait());
        // The other threads help with this loop, or wait for its end.
        std::atomic<int> pieces{0};
        pool_.ParallelFor(50, [&](int64_t) { ++pieces; });
        EXPECT_EQ(pieces, 50);
        return Make(5)();
      };
      if (++asking == kThreads) started.Open();
      const auto found = cache.Get("key", 10, make);
      ASSERT_TRUE(found.ok()) << found.status();
      EXPECT_EQ(ValueOf(*found), 5);
      if (!found->shared) ++own;
    });
  }
  for (std::thread& thread : threads) thread.join();
  EXPECT_EQ(made_, 1);
  EXPECT_EQ(own, 1);
  EXPECT_EQ(budget_.reserved(), 10);
}

TEST_F(SharedCacheTest, WhatTheMakerCannotKeepIsStillSharedWithThoseWhoWait) {
  constexpr int kThreads = 4;
  SharedCache cache(pool_, budget_, 0);
  Gate started;
  std::atomic<int> asking{0};
  std::vector<std::thread> threads;
  threads.reserve(kThreads);
  for (int t = 0; t < kThreads; ++t) {
    threads.emplace_back([&] {
      if (++asking == kThreads) started.Open();
      const auto found = cache.Get("key", 10, [&] {
        EXPECT_TRUE(started.Wait());
        return Make(3)();
      });
      ASSERT_TRUE(found.ok());
      EXPECT_EQ(ValueOf(*found), 3);
    });
  }
  for (std::thread& thread : threads) thread.join();
  EXPECT_EQ(alive_, 0);
  EXPECT_EQ(budget_.reserved(), 0);
}

TEST_F(SharedCacheTest, AfterTheMakersErrorAnotherMakes) {
  constexpr int kThreads = 5;
  SharedCache cache(pool_, budget_, 100);
  Gate started;
  std::atomic<int> asking{0};
  std::atomic<int> attempts{0};
  std::atomic<int> refused{0};
  std::vector<std::thread> threads;
  threads.reserve(kThreads);
  for (int t = 0; t < kThreads; ++t) {
    threads.emplace_back([&] {
      const auto make = [&]() -> absl::StatusOr<SharedCache::Value> {
        EXPECT_TRUE(started.Wait());
        if (++attempts <= 2) return absl::InternalError("not yet");
        return Make(9)();
      };
      if (++asking == kThreads) started.Open();
      const auto found = cache.Get("key", 10, make);
      if (found.ok()) {
        EXPECT_EQ(ValueOf(*found), 9);
      } else {
        EXPECT_EQ(found.status().code(), absl::StatusCode::kInternal);
        ++refused;
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
  EXPECT_EQ(refused, 2);
  EXPECT_EQ(made_, 1);
}

TEST_F(SharedCacheTest, AnExceptionOfTheMakerLeavesNothingBehind) {
  SharedCache cache(pool_, budget_, 100);
  EXPECT_THROW(cache
                   .Get("key", 10,
                        []() -> absl::StatusOr<SharedCache::Value> {
                          throw std::runtime_error("out of luck");
                        })
                   .IgnoreError(),
               std::runtime_error);
  EXPECT_FALSE(Shared(cache, "key"));
  EXPECT_TRUE(Shared(cache, "key"));
}

TEST_F(SharedCacheTest, TheLeastRecentlyUsedGoesFirst) {
  SharedCache cache(pool_, budget_, 30);
  for (const char* key : {"a", "b", "c"}) EXPECT_FALSE(Shared(cache, key));
  EXPECT_TRUE(Shared(cache, "a"));
  EXPECT_FALSE(Shared(cache, "d"));
  EXPECT_EQ(alive_, 3);
  EXPECT_EQ(budget_.reserved(), 30);
  EXPECT_TRUE(Shared(cache, "a"));
  EXPECT_TRUE(Shared(cache, "c"));
  EXPECT_TRUE(Shared(cache, "d"));
  EXPECT_FALSE(Shared(cache, "b"));
}

TEST_F(SharedCacheTest, WhatIsLargerThanItsCapacityIsTheCallersAlone) {
  SharedCache cache(pool_, budget_, 30);
  EXPECT_FALSE(Shared(cache, "large", 31));
  EXPECT_FALSE(Shared(cache, "large", 31));
  EXPECT_EQ(alive_, 0);
  EXPECT_EQ(budget_.reserved(), 0);
}

TEST_F(SharedCacheTest, WithoutRoomInTheBudgetNothingIsKept) {
  SharedCache cache(pool_, budget_, 100);
  const auto others = budget_.TryReserve(995, "others");
  ASSERT_TRUE(others.ok());
  EXPECT_FALSE(Shared(cache, "a"));
  EXPECT_FALSE(Shared(cache, "a"));
  EXPECT_EQ(budget_.reserved(), 995);
}

TEST_F(SharedCacheTest, ReclaimDropsWhatNobodyUses) {
  SharedCache cache(pool_, budget_, 100);
  for (const char* key : {"a", "b", "c"}) EXPECT_FALSE(Shared(cache, key));
  auto used = cache.Get("b", 10, Make(1));
  ASSERT_TRUE(used.ok());
  cache.Reclaim(1);
  EXPECT_EQ(budget_.reserved(), 20);
  cache.Reclaim(1000);
  EXPECT_EQ(budget_.reserved(), 10);
  EXPECT_EQ(alive_, 1);
  EXPECT_TRUE(Shared(cache, "b"));
  used->value = nullptr;
  cache.Reclaim(1);
  EXPECT_EQ(budget_.reserved(), 0);
  EXPECT_EQ(alive_, 0);
}

TEST_F(SharedCacheTest, WhoeverReservesGetsWhatNobodyUses) {
  SharedCache cache(pool_, budget_, 1000);
  budget_.SetReclaimer([&](int64_t bytes) { cache.Reclaim(bytes); });
  for (const char* key : {"a", "b", "c"}) EXPECT_FALSE(Shared(cache, key, 300));
  {
    const auto job = budget_.TryReserve(500, "a job");
    ASSERT_TRUE(job.ok()) << job.status();
    EXPECT_EQ(alive_, 1);
    // Here the budget calls Reclaim while the cache is about to keep a value.
    EXPECT_FALSE(Shared(cache, "d", 400));
    EXPECT_EQ(budget_.reserved(), 900);
  }
  budget_.SetReclaimer(nullptr);
}

TEST_F(SharedCacheTest, DroppedValuesLiveWhileTheyAreUsed) {
  SharedCache cache(pool_, budget_, 100);
  for (const char* key : {"calibration/1/a", "calibration/1/b", "calibration/10/a", "calib"}) {
    EXPECT_FALSE(Shared(cache, key));
  }
  auto used = cache.Get("calibration/1/a", 10, Make(1));
  ASSERT_TRUE(used.ok());
  cache.Drop("calibration/1/");
  EXPECT_EQ(alive_, 3);
  EXPECT_EQ(budget_.reserved(), 30);
  EXPECT_TRUE(Shared(cache, "calibration/10/a"));
  EXPECT_TRUE(Shared(cache, "calib"));
  EXPECT_FALSE(Shared(cache, "calibration/1/a"));
  used->value = nullptr;
  EXPECT_EQ(alive_, 3);
  EXPECT_EQ(budget_.reserved(), 30);
}

TEST_F(SharedCacheTest, ThreadsNeverPassTheCapacity) {
  constexpr int kThreads = 4;
  ByteBudget budget(1000);
  SharedCache cache(pool_, budget, 25);
  std::vector<std::thread> threads;
  threads.reserve(kThreads);
  for (int t = 0; t < kThreads; ++t) {
    threads.emplace_back([&, t] {
      for (int i = 0; i < 300; ++i) {
        Shared(cache, absl::StrCat("key", (t * 7 + i) % 11));
        if (i % 50 == 0) cache.Reclaim(10);
        if (i % 70 == 0) cache.Drop("key1");
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
  // Now that no thread uses a value: until then a dropped one stays reserved.
  EXPECT_LE(budget.reserved(), 25);
  cache.Reclaim(1000);
  EXPECT_EQ(budget.reserved(), 0);
  EXPECT_EQ(alive_, 0);
}

// Two values arrive together and only one fits: the second arrives while the budget is asked for
// the first.
TEST_F(SharedCacheTest, TwoArriveWhereOneFits) {
  ByteBudget full(5);
  SharedCache cache(pool_, full, 10);
  bool nested = false;
  full.SetReclaimer([&](int64_t /*bytes*/) {
    if (std::exchange(nested, true)) return;
    full.SetCapacity(1000);
    EXPECT_FALSE(Shared(cache, "second"));
  });
  EXPECT_FALSE(Shared(cache, "first"));
  EXPECT_TRUE(nested);
  EXPECT_LE(full.reserved(), 10);
  full.SetReclaimer(nullptr);
}

}  // namespace
}  // namespace certiq::server
