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
  TenantQuotas quotas_{memory_, disk_};
};

TEST_F(AccountsTest, WhatATenantHoldsTheServerHolds) {
  TenantQuota& a = quotas_.Of(Tenant{"a", {.memory_bytes = 600, .disk_bytes = 50}});
  TenantQuota& b = quotas_.Of(Tenant{"b", {}});
  {
    const auto held = a.memory.TryReserve(500, "this layer");
    ASSERT_TRUE(held.ok());
    EXPECT_EQ(a.memory.reserved(), 500);
    EXPECT_EQ(memory_.reserved(), 500);
    EXPECT_EQ(b.memory.reserved(), 0);
    const auto own = a.memory.TryReserve(200, "this layer");
    EXPECT_CONTAINS(own.status().message(), "100 of this tenant's memory of 600");
    // The other tenant is limited by the rest of the server's budget.
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
  TenantQuota& quota = quotas_.Of(Tenant{"a", {.memory_bytes = 100, .jobs = 1}});
  EXPECT_EQ(&quotas_.Of(std::string("a")), &quota);
  EXPECT_EQ(quota.memory.capacity(), 100);
  auto held = quota.memory.TryReserve(80, "this layer");
  ASSERT_TRUE(held.ok());

  EXPECT_EQ(&quotas_.Of(Tenant{"a", {.memory_bytes = 40, .jobs = 0}}), &quota);
  EXPECT_EQ(held->bytes(), 80);
  EXPECT_FALSE(quota.memory.TryReserve(1, "this layer").ok());
  EXPECT_EQ(base::RetryAfterOf(quota.jobs.Take("jobs").status()), std::nullopt);

  quotas_.Of(Tenant{"a", {.memory_bytes = 400, .jobs = 2}});
  EXPECT_TRUE(quota.memory.TryReserve(320, "this layer").ok());
  EXPECT_TRUE(quota.jobs.Take("jobs").ok());
}

TEST_F(AccountsTest, UnheardOfTenantsHaveNoLimits) {
  TenantQuota& quota = quotas_.Of(std::string("found at the start"));
  EXPECT_TRUE(quota.memory.TryReserve(1000, "this layer").ok());
  EXPECT_FALSE(quota.memory.TryReserve(1001, "this layer").ok());
  EXPECT_TRUE(quota.streams.Take("streams").ok());
}

TEST_F(AccountsTest, PlacesAreCounted) {
  CountQuota quota;
  quota.SetLimit(2);
  auto first = quota.Take("jobs");
  ASSERT_TRUE(first.ok());
  const CountQuota::Permit beyond = quota.TakeUnchecked();
  const CountQuota::Permit more = quota.TakeUnchecked();
  const auto refused = quota.Take("jobs");
  ASSERT_TRUE(absl::IsResourceExhausted(refused.status()));
  EXPECT_CONTAINS(refused.status().message(), "all 2 jobs");
  EXPECT_EQ(base::RetryAfterOf(refused.status()), base::kRetrySoon);
  {
    CountQuota::Permit moved = *std::move(first);
    CountQuota::Permit again;
    again = std::move(moved);
    EXPECT_FALSE(quota.Take("jobs").ok());
  }
  // One permit is still beyond the limit.
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
        TenantQuota& quota =
            quotas_.Of(Tenant{t % 2 == 0 ? "even" : "odd", {.memory_bytes = 600, .jobs = 1}});
        const auto bytes = quota.memory.TryReserve(300, "this layer");
        EXPECT_LE(memory_.reserved(), 1000);
        if (t % 2 != 0) continue;
        const auto permit = quota.jobs.Take("jobs");
        if (!permit.ok()) continue;
        EXPECT_EQ(++held, 1);
        --held;
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
  EXPECT_EQ(memory_.reserved(), 0);
  EXPECT_EQ(quotas_.Of(std::string("even")).memory.reserved(), 0);
}

}  // namespace
}  // namespace certiq::server
