#include "runtime/strand.h"

#include <gtest/gtest.h>

#include <atomic>
#include <memory>
#include <stdexcept>
#include <thread>
#include <vector>

#include "support/gate.h"

namespace certiq::server {
namespace {

using testing::Gate;

void Ignore(const absl::Status& /*status*/) {}

TEST(StrandTest, RunsOneAtATimeInOrder) {
  constexpr int kTasks = 200;
  WorkerPool pool(4, 1);
  const auto strand = std::make_shared<Strand>(pool);
  std::vector<int> order;  // The strand is its lock.
  std::atomic<int> inside{0};
  Gate all;
  for (int i = 0; i < kTasks; ++i) {
    ASSERT_TRUE(strand
                    ->Post({.run =
                                [&, i] {
                                  EXPECT_EQ(++inside, 1);
                                  order.push_back(i);
                                  return absl::OkStatus();
                                },
                            .done =
                                [&, i](const absl::Status& status) {
                                  EXPECT_TRUE(status.ok());
                                  EXPECT_EQ(order.back(), i);
                                  EXPECT_EQ(--inside, 0);
                                  if (i == kTasks - 1) all.Open();
                                }})
                    .ok());
  }
  ASSERT_TRUE(all.Wait());
  ASSERT_EQ(order.size(), static_cast<size_t>(kTasks));
  for (int i = 0; i < kTasks; ++i) EXPECT_EQ(order[static_cast<size_t>(i)], i);
}

TEST(StrandTest, StrandsRunBesideEachOther) {
  WorkerPool pool(2, 1);
  const auto one = std::make_shared<Strand>(pool);
  const auto two = std::make_shared<Strand>(pool);
  Gate both;
  std::atomic<int> inside{0};
  Gate ended[2];
  for (int s = 0; s < 2; ++s) {
    ASSERT_TRUE((s == 0 ? one : two)
                    ->Post({.run =
                                [&] {
                                  if (++inside == 2) both.Open();
                                  EXPECT_TRUE(both.Wait());
                                  return absl::OkStatus();
                                },
                            .done = [&, s](const absl::Status&) { ended[s].Open(); }})
                    .ok());
  }
  EXPECT_TRUE(ended[0].Wait());
  EXPECT_TRUE(ended[1].Wait());
}

TEST(StrandTest, TasksAndCompletionsMayPost) {
  WorkerPool pool(1, 1);
  const auto strand = std::make_shared<Strand>(pool);
  Gate last;
  std::vector<int> order;
  const auto add = [&](int i) {
    return [&, i] {
      order.push_back(i);
      return absl::OkStatus();
    };
  };
  ASSERT_TRUE(strand
                  ->Post({.run =
                              [&] {
                                order.push_back(0);
                                return strand->Post({.run = add(1), .done = Ignore});
                              },
                          .done =
                              [&](const absl::Status& status) {
                                EXPECT_TRUE(status.ok());
                                EXPECT_TRUE(
                                    strand
                                        ->Post({.run = add(2),
                                                .done = [&](const absl::Status&) { last.Open(); }})
                                        .ok());
                              }})
                  .ok());
  ASSERT_TRUE(last.Wait());
  EXPECT_EQ(order, (std::vector<int>{0, 1, 2}));
}

TEST(StrandTest, GoesOnAfterWhatThrows) {
  WorkerPool pool(1, 1);
  const auto strand = std::make_shared<Strand>(pool);
  Gate second;
  ASSERT_TRUE(strand
                  ->Post({.run = []() -> absl::Status { throw std::runtime_error("run"); },
                          .done =
                              [](const absl::Status& status) {
                                EXPECT_EQ(status.code(), absl::StatusCode::kInternal);
                                throw std::runtime_error("done");
                              }})
                  .ok());
  ASSERT_TRUE(strand
                  ->Post({.run = [] { return absl::OkStatus(); },
                          .done = [&](const absl::Status&) { second.Open(); }})
                  .ok());
  EXPECT_TRUE(second.Wait());
}

TEST(StrandTest, ATaskUnderWayKeepsIt) {
  WorkerPool pool(1, 1);
  auto strand = std::make_shared<Strand>(pool);
  Gate begin;
  Gate end;
  ASSERT_TRUE(strand
                  ->Post({.run =
                              [&] {
                                EXPECT_TRUE(begin.Wait());
                                return absl::OkStatus();
                              },
                          .done = Ignore})
                  .ok());
  ASSERT_TRUE(strand
                  ->Post({.run = [] { return absl::OkStatus(); },
                          .done = [&](const absl::Status&) { end.Open(); }})
                  .ok());
  const std::weak_ptr<Strand> watch = strand;
  strand.reset();
  begin.Open();
  EXPECT_TRUE(end.Wait());
  pool.Shutdown();
  EXPECT_TRUE(watch.expired());
}

TEST(StrandTest, ShutdownTellsThoseWhoWait) {
  WorkerPool pool(1, 1);
  const auto strand = std::make_shared<Strand>(pool);
  Gate inside;
  Gate go;
  std::vector<absl::StatusCode> codes;
  const auto note = [&](const absl::Status& status) { codes.push_back(status.code()); };
  ASSERT_TRUE(strand
                  ->Post({.run =
                              [&] {
                                inside.Open();
                                EXPECT_TRUE(go.Wait());
                                return absl::OkStatus();
                              },
                          .done = note})
                  .ok());
  for (int i = 0; i < 3; ++i) {
    ASSERT_TRUE(strand->Post({.run = [] { return absl::OkStatus(); }, .done = note}).ok());
  }
  ASSERT_TRUE(inside.Wait());
  std::thread stop([&] { pool.Shutdown(); });
  // The pool takes no more tasks once it stops.
  while (pool.admitting()) std::this_thread::yield();
  go.Open();
  stop.join();
  ASSERT_EQ(codes.size(), 4U);
  EXPECT_EQ(codes[0], absl::StatusCode::kOk);
  for (size_t i = 1; i < 4; ++i) EXPECT_EQ(codes[i], absl::StatusCode::kUnavailable);

  const absl::Status late = strand->Post({.run =
                                              [] {
                                                ADD_FAILURE() << "ran after the end";
                                                return absl::OkStatus();
                                              },
                                          .done = [](const absl::Status&) { ADD_FAILURE(); }});
  EXPECT_EQ(late.code(), absl::StatusCode::kUnavailable);
}

TEST(StrandTest, ManyThreadsPost) {
  constexpr int kThreads = 4;
  constexpr int kTasks = 250;
  WorkerPool pool(3, 1);
  const auto strand = std::make_shared<Strand>(pool);
  int sum = 0;  // The strand is its lock.
  std::vector<int> last(kThreads, -1);
  std::vector<std::thread> threads;
  threads.reserve(kThreads);
  for (int t = 0; t < kThreads; ++t) {
    threads.emplace_back([&, t] {
      for (int i = 0; i < kTasks; ++i) {
        EXPECT_TRUE(strand
                        ->Post({.run =
                                    [&, t, i] {
                                      ++sum;
                                      EXPECT_EQ(last[static_cast<size_t>(t)], i - 1);
                                      last[static_cast<size_t>(t)] = i;
                                      return absl::OkStatus();
                                    },
                                .done = Ignore})
                        .ok());
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
  Gate done;
  ASSERT_TRUE(strand
                  ->Post({.run = [] { return absl::OkStatus(); },
                          .done = [&](const absl::Status&) { done.Open(); }})
                  .ok());
  ASSERT_TRUE(done.Wait());
  EXPECT_EQ(sum, kThreads * kTasks);
}

}  // namespace
}  // namespace certiq::server
