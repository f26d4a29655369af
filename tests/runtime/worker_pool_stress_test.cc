// WorkerPool under concurrent use of everything, for ThreadSanitizer.

#include <gtest/gtest.h>

#include <atomic>
#include <chrono>
#include <memory>
#include <random>
#include <thread>
#include <utility>
#include <vector>

#include "runtime/worker_pool.h"
#include "support/gate.h"

namespace certiq::server {
namespace {

constexpr int kClients = 4;
constexpr int kRounds = 200;

// Every job and task that the pool accepted completes exactly once, however it ends.
void Hammer(WorkerPool& pool, uint32_t seed, std::atomic<int>& taken, std::atomic<int>& ended) {
  std::mt19937 random(seed);
  for (int round = 0; round < kRounds; ++round) {
    const auto work = [&pool] {
      std::atomic<int64_t> sum{0};
      pool.ParallelFor(8, [&](int64_t i) { sum += i; });
      EXPECT_EQ(sum, 28);
      return absl::OkStatus();
    };
    const auto done = [&ended](const absl::Status&) { ++ended; };
    if (random() % 2 == 0 && pool.Post({.run = work, .done = done}).ok()) ++taken;
    auto slot = pool.Admit();
    if (!slot.ok()) continue;
    const auto id =
        pool.Enqueue(*std::move(slot), {.priority = static_cast<int>(random() % 3),
                                        .cancellation = std::make_shared<engine::Cancellation>(),
                                        .run = work,
                                        .done = done});
    if (!id.ok()) continue;
    ++taken;
    if (random() % 4 == 0) pool.Cancel(*id, absl::StatusCode::kCancelled);
  }
}

TEST(WorkerPoolStressTest, EverythingCompletesOnce) {
  for (const int workers : {1, 3}) {
    std::atomic<int> taken{0};
    std::atomic<int> ended{0};
    WorkerPool pool(workers, 8);
    std::vector<std::thread> clients;
    clients.reserve(kClients);
    for (int c = 0; c < kClients; ++c) {
      clients.emplace_back([&, c] { Hammer(pool, static_cast<uint32_t>(c), taken, ended); });
    }
    for (std::thread& client : clients) client.join();
    EXPECT_TRUE(pool.Drain(std::chrono::steady_clock::now() + testing::kPatience));
    EXPECT_EQ(taken, ended);
    EXPECT_GT(taken, kClients * kRounds / 4);
  }
}

TEST(WorkerPoolStressTest, ShutdownInTheMiddle) {
  for (int round = 0; round < 20; ++round) {
    std::atomic<int> taken{0};
    std::atomic<int> ended{0};
    WorkerPool pool(2, 8);
    std::vector<std::thread> clients;
    clients.reserve(2);
    for (int c = 0; c < 2; ++c) {
      clients.emplace_back([&, c] { Hammer(pool, static_cast<uint32_t>(c), taken, ended); });
    }
    pool.Shutdown();
    for (std::thread& client : clients) client.join();
    EXPECT_EQ(taken, ended);
  }
}

}  // namespace
}  // namespace certiq::server
