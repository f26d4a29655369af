#include "runtime/tenant_quota.h"

#include <gtest/gtest.h>

#include <atomic>
#include <optional>
#include <thread>
#include <utility>
#include <vector>

#include "base/status.h"
#include "support/text.h"

namespace certiq::server {
namespace {

class AccountsTest : public ::testing::Test {
 protected:
  ByteBudget memory_{1000};
  ByteBudget disk_{2000};
  Accounts accounts_{memory_, disk_};
};

TEST_F(AccountsTest, WhatATenantHoldsTheServerHolds) {
  Account& a = accounts_.Of(Tenant{"a", {.memory_bytes = 600, .disk_bytes = 50}});
  Account& b = accounts_.Of(Tenant{"b", {}});
  {
    const auto held = a.memory.TryReserve(500, "this layer");
    ASSERT_TRUE(held.ok());
    EXPECT_EQ(a.memory.reserved(), 500);
    EXPECT_EQ(memory_.reserved(), 500);
    EXPECT_EQ(b.memory.reserved(), 0);
    const auto own = a.memory.TryReserve(200, "this layer");
    EXPECT_CONTAINS(own.status().message(), "100 of this tenant's memory of 600");
    // The other is stopped by what the server has left.
    const auto others = b.memory.TryReserve(501, "this layer");
    EXPECT_CONTAINS(others.status().message(), "500 of the budget of 1000");
    EXPECT_EQ(b.memory.reserved(), 0);
    EXPECT_TRUE(a.disk.TryReserve(50, "this job").ok());
    EXPECT_FALSE(a.disk.TryReserve(51, "this job").ok());
  }
  EXPECT_EQ(a.memory.reserved(), 0);
  EXPECT_EQ(memory_.reserved(), 0);
  EXPECT_EQ(disk_.reserved(), 0);
}

TEST_F(AccountsTest, LimitsAreThoseLastHeardOf) {
  Account& account = accounts_.Of(Tenant{"a", {.memory_bytes = 100, .jobs = 1}});
  EXPECT_EQ(&accounts_.Of(std::string("a")), &account);
  EXPECT_EQ(account.memory.capacity(), 100);
  auto held = account.memory.TryReserve(80, "this layer");
  ASSERT_TRUE(held.ok());

  EXPECT_EQ(&accounts_.Of(Tenant{"a", {.memory_bytes = 40, .jobs = 0}}), &account);
  EXPECT_EQ(held->bytes(), 80);
  EXPECT_FALSE(account.memory.TryReserve(1, "this layer").ok());
  EXPECT_EQ(base::RetryAfterOf(account.jobs.Take("jobs").status()), std::nullopt);

  accounts_.Of(Tenant{"a", {.memory_bytes = 400, .jobs = 2}});
  EXPECT_TRUE(account.memory.TryReserve(320, "this layer").ok());
  EXPECT_TRUE(account.jobs.Take("jobs").ok());
}

TEST_F(AccountsTest, UnheardOfTenantsHaveNoLimits) {
  Account& account = accounts_.Of(std::string("found at the start"));
  EXPECT_TRUE(account.memory.TryReserve(1000, "this layer").ok());
  EXPECT_FALSE(account.memory.TryReserve(1001, "this layer").ok());
  EXPECT_TRUE(account.streams.Take("streams").ok());
}

TEST_F(AccountsTest, PlacesAreCounted) {
  CountQuota quota;
  quota.SetLimit(2);
  auto first = quota.Take("jobs");
  ASSERT_TRUE(first.ok());
  const CountQuota::Place beyond = quota.TakeAnyway();
  const CountQuota::Place more = quota.TakeAnyway();
  const auto refused = quota.Take("jobs");
  ASSERT_TRUE(absl::IsResourceExhausted(refused.status()));
  EXPECT_CONTAINS(refused.status().message(), "all 2 jobs");
  EXPECT_EQ(base::RetryAfterOf(refused.status()), base::kRetrySoon);
  {
    CountQuota::Place moved = *std::move(first);
    CountQuota::Place again;
    again = std::move(moved);
    EXPECT_FALSE(quota.Take("jobs").ok());
  }
  // Still one beyond the limit.
  EXPECT_FALSE(quota.Take("jobs").ok());
  quota.SetLimit(3);
  EXPECT_TRUE(quota.Take("jobs").ok());
}

TEST_F(AccountsTest, ThreadsNeverPassALimit) {
  std::atomic<int> held{0};
  std::vector<std::thread> threads;
  threads.reserve(4);
  for (int t = 0; t < 4; ++t) {
    threads.emplace_back([&, t] {
      for (int i = 0; i < 1000; ++i) {
        Account& account =
            accounts_.Of(Tenant{t % 2 == 0 ? "even" : "odd", {.memory_bytes = 600, .jobs = 1}});
        const auto bytes = account.memory.TryReserve(300, "this layer");
        EXPECT_LE(memory_.reserved(), 1000);
        if (t % 2 != 0) continue;
        const auto place = account.jobs.Take("jobs");
        if (!place.ok()) continue;
        EXPECT_EQ(++held, 1);
        --held;
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
  EXPECT_EQ(memory_.reserved(), 0);
  EXPECT_EQ(accounts_.Of(std::string("even")).memory.reserved(), 0);
}

}  // namespace
}  // namespace certiq::server
