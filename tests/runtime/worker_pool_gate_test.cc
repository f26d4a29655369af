// WorkerPool: jobs that wait for resources, slots, positions, HelpUntil.

#include <gtest/gtest.h>

#include <atomic>
#include <chrono>
#include <memory>
#include <thread>
#include <utility>
#include <vector>

#include "base/mutex.h"
#include "base/status.h"
#include "runtime/worker_pool.h"
#include "support/gate.h"
#include "support/layers.h"

namespace certiq::server {
namespace {

using testing::Gate;
using testing::kPatience;
using testing::MakeBlockingJob;

// Runs jobs on one worker and records their order.
class WorkerPoolGateTest : public ::testing::Test {
 protected:
  WorkerPool::JobId Enqueue(int name, std::function<bool()> ready = nullptr, int priority = 0) {
    auto slot = pool_.Admit();
    EXPECT_TRUE(slot.ok()) << slot.status();
    auto id =
        pool_.Enqueue(*std::move(slot), {.priority = priority,
                                         .cancellation = std::make_shared<engine::Cancellation>(),
                                         .ready = std::move(ready),
                                         .run =
                                             [this, name] {
                                               const base::MutexLock lock(mu_);
                                               order_.push_back(name);
                                               return absl::OkStatus();
                                             },
                                         .done = [](const absl::Status&) {}});
    EXPECT_TRUE(id.ok()) << id.status();
    return id.value_or(0);
  }
  // Waits until a job behind all others, which needs no resources, has run.
  void PassAll() {
    auto passed = std::make_shared<Gate>();
    ASSERT_TRUE(pool_
                    .Enqueue(pool_.AdmitAgain(),
                             {.priority = -1000,
                              .cancellation = std::make_shared<engine::Cancellation>(),
                              .run = [] { return absl::OkStatus(); },
                              .done = [passed](const absl::Status&) { passed->Open(); }})
                    .ok());
    ASSERT_TRUE(passed->Wait());
  }
  std::vector<int> order() {
    const base::MutexLock lock(mu_);
    return order_;
  }
  static std::chrono::steady_clock::time_point Soon() {
    return std::chrono::steady_clock::now() + kPatience;
  }

  base::Mutex mu_;
  std::vector<int> order_ ABSL_GUARDED_BY(mu_);
  std::atomic<bool> open_{false};
  Gate gate_;
  WorkerPool pool_{1, 8};
};

TEST_F(WorkerPoolGateTest, OnlyWhatNeedsNothingPassesAJobThatIsNotReady) {
  ASSERT_TRUE(pool_.Enqueue(pool_.AdmitAgain(), MakeBlockingJob(pool_, gate_)).ok());
  const auto ready = [this] { return open_.load(); };
  Enqueue(1, ready);
  Enqueue(2, [] { return true; });
  Enqueue(3);
  gate_.Open();
  PassAll();
  EXPECT_EQ(order(), (std::vector<int>{3}));
  EXPECT_EQ(pool_.queue_depth(), 2);
  open_ = true;
  pool_.Poke();
  EXPECT_TRUE(pool_.Drain(Soon()));
  EXPECT_EQ(order(), (std::vector<int>{3, 1, 2}));
}

TEST_F(WorkerPoolGateTest, AReadyJobIsTakenOnce) {
  std::atomic<int> asked{0};
  Enqueue(1, [&] {
    ++asked;
    return open_.load();
  });
  PassAll();
  EXPECT_GT(asked, 0);
  open_ = true;
  pool_.Poke();
  EXPECT_TRUE(pool_.Drain(Soon()));
  const int then = asked;
  pool_.Poke();
  EXPECT_EQ(asked, then);
  EXPECT_EQ(order(), (std::vector<int>{1}));
}

TEST_F(WorkerPoolGateTest, TheEndOfAJobAsksAgain) {
  Enqueue(1, [this] { return open_.load(); });
  ASSERT_TRUE(
      pool_
          .Enqueue(pool_.AdmitAgain(), {.cancellation = std::make_shared<engine::Cancellation>(),
                                        .run =
                                            [this] {
                                              open_ = true;
                                              return absl::OkStatus();
                                            },
                                        .done = [](const absl::Status&) {}})
          .ok());
  EXPECT_TRUE(pool_.Drain(Soon()));
  EXPECT_EQ(order(), (std::vector<int>{1}));
}

TEST_F(WorkerPoolGateTest, CancellingTheOneInFrontLetsTheNextStart) {
  const WorkerPool::JobId first = Enqueue(1, [] { return false; });
  Enqueue(2, [] { return true; });
  PassAll();
  EXPECT_TRUE(order().empty());
  pool_.Cancel(first, absl::StatusCode::kCancelled);
  EXPECT_TRUE(pool_.Drain(Soon()));
  EXPECT_EQ(order(), (std::vector<int>{2}));
}

TEST_F(WorkerPoolGateTest, HigherPriorityIsAskedFirst) {
  Enqueue(1, [this] { return open_.load(); });
  Enqueue(
      2, [this] { return open_.load(); }, 5);
  PassAll();
  open_ = true;
  pool_.Poke();
  EXPECT_TRUE(pool_.Drain(Soon()));
  EXPECT_EQ(order(), (std::vector<int>{2, 1}));
}

// One holder has three quarters of the places at most; whoever has no name may have all.
TEST_F(WorkerPoolGateTest, OneHolderLeavesPlacesForOthers) {
  std::vector<WorkerPool::Slot> slots;
  for (int i = 0; i < 6; ++i) {
    auto slot = pool_.Admit("mallory");
    ASSERT_TRUE(slot.ok()) << i;
    slots.push_back(*std::move(slot));
  }
  const absl::Status refused = pool_.Admit("mallory").status();
  EXPECT_TRUE(absl::IsResourceExhausted(refused));
  EXPECT_TRUE(base::RetryAfterOf(refused).has_value());
  for (int i = 0; i < 2; ++i) {
    auto slot = pool_.Admit("bob");
    ASSERT_TRUE(slot.ok()) << i;
    slots.push_back(*std::move(slot));
  }
  EXPECT_TRUE(absl::IsResourceExhausted(pool_.Admit("bob").status()));
  // A place that is given back is its holder's again; one that moved is given back once.
  WorkerPool::Slot moved = std::move(slots.front());
  slots.erase(slots.begin());
  moved.Release();
  EXPECT_TRUE(pool_.Admit("mallory").ok());
  EXPECT_TRUE(pool_.Admit("bob").ok());
  // So is the place of a job that runs, or that is cancelled while it waits.
  gate_.Open();
  while (!slots.empty()) {
    ASSERT_TRUE(pool_.Enqueue(std::move(slots.back()), MakeBlockingJob(pool_, gate_)).ok());
    slots.pop_back();
  }
  while (pool_.queue_depth() > 0) std::this_thread::yield();
  for (int i = 0; i < 8; ++i) {
    auto slot = pool_.Admit();
    ASSERT_TRUE(slot.ok()) << i;
    slots.push_back(*std::move(slot));
  }
  EXPECT_TRUE(absl::IsResourceExhausted(pool_.Admit().status()));
  slots.clear();
  EXPECT_TRUE(pool_.Drain(Soon()));
}

TEST_F(WorkerPoolGateTest, PlacesBeyondTheLimitCount) {
  std::vector<WorkerPool::Slot> slots;
  slots.reserve(9);
  for (int i = 0; i < 9; ++i) slots.push_back(pool_.AdmitAgain());
  EXPECT_TRUE(absl::IsResourceExhausted(pool_.Admit().status()));
  slots.pop_back();
  EXPECT_TRUE(absl::IsResourceExhausted(pool_.Admit().status()));
  slots.pop_back();
  EXPECT_TRUE(pool_.Admit().ok());
  pool_.StopAdmitting();
  slots.push_back(pool_.AdmitAgain());
  slots.clear();
  EXPECT_TRUE(pool_.Drain(Soon()));
}

TEST_F(WorkerPoolGateTest, WaitRunningIgnoresTheQueue) {
  Enqueue(1, [] { return false; });
  EXPECT_TRUE(pool_.WaitRunning(Soon()));
  EXPECT_EQ(pool_.queue_depth(), 1);
  Gate started;
  WorkerPool::Job job = MakeBlockingJob(pool_, gate_);
  job.run = [&started, run = std::move(job.run)] {
    started.Open();
    return run();
  };
  ASSERT_TRUE(pool_.Enqueue(pool_.AdmitAgain(), std::move(job)).ok());
  ASSERT_TRUE(started.Wait());
  EXPECT_FALSE(pool_.WaitRunning(std::chrono::steady_clock::now()));
  gate_.Open();
  EXPECT_TRUE(pool_.WaitRunning(Soon()));
  EXPECT_FALSE(pool_.Drain(std::chrono::steady_clock::now()));
}

TEST_F(WorkerPoolGateTest, WhoWaitsHelps) {
  std::atomic<bool> done{false};
  std::atomic<int> inside{0};
  Gate both;
  std::thread helper([&] { pool_.HelpUntil(done); });
  // Three pieces that wait for each other: this thread, the worker, and the helper.
  pool_.ParallelFor(3, [&](int64_t) {
    if (++inside == 3) both.Open();
    EXPECT_TRUE(both.Wait());
  });
  done = true;
  pool_.WakeHelpers();
  helper.join();
  // HelpUntil returns at once if its condition holds.
  pool_.HelpUntil(done);
}

TEST_F(WorkerPoolGateTest, ManyHelpers) {
  constexpr int kHelpers = 3;
  for (int round = 0; round < 50; ++round) {
    std::atomic<bool> done{false};
    std::atomic<int> pieces{0};
    std::vector<std::thread> helpers;
    helpers.reserve(kHelpers);
    for (int h = 0; h < kHelpers; ++h) helpers.emplace_back([&] { pool_.HelpUntil(done); });
    pool_.ParallelFor(20, [&](int64_t) { ++pieces; });
    EXPECT_EQ(pieces, 20);
    done = true;
    pool_.WakeHelpers();
    for (std::thread& helper : helpers) helper.join();
  }
}

}  // namespace
}  // namespace certiq::server
