#include "runtime/worker_pool.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <memory>
#include <new>
#include <numeric>
#include <set>
#include <stdexcept>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "base/mutex.h"
#include "base/status.h"
#include "support/gate.h"
#include "support/layers.h"
#include "support/text.h"

namespace certiq::server {
namespace {

using testing::Gate;
using testing::kPatience;
using testing::MakeBlockingJob;

// A job that runs `body` and succeeds.
WorkerPool::Job MakeJob(std::function<void()> body, std::function<void(absl::Status)> done = {}) {
  return {.cancellation = std::make_shared<engine::Cancellation>(),
          .run =
              [body = std::move(body)] {
                body();
                return absl::OkStatus();
              },
          .done = done ? std::move(done) : [](const absl::Status& /*status*/) {}};
}

WorkerPool::JobId Enqueue(WorkerPool& pool, WorkerPool::Job job) {
  auto slot = pool.Admit();
  EXPECT_TRUE(slot.ok()) << slot.status();
  auto id = pool.Enqueue(*std::move(slot), std::move(job));
  EXPECT_TRUE(id.ok()) << id.status();
  return id.value_or(0);
}

std::chrono::steady_clock::time_point Soon() {
  return std::chrono::steady_clock::now() + kPatience;
}

TEST(WorkerPoolTest, ParallelForRunsEveryPieceOnce) {
  for (const int workers : {1, 2, 5}) {
    WorkerPool pool(workers, 4);
    for (const int64_t count : {0, 1, 2, 3, 1000}) {
      std::vector<std::atomic<int>> runs(static_cast<size_t>(count));
      pool.ParallelFor(count, [&](int64_t i) { ++runs[static_cast<size_t>(i)]; });
      for (const auto& n : runs) EXPECT_EQ(n, 1);
    }
  }
}

TEST(WorkerPoolTest, ResultsDoNotDependOnTheNumberOfWorkers) {
  const auto compute = [](engine::Executor& executor) {
    std::vector<double> out(500);
    executor.ParallelFor(500, [&](int64_t i) {
      double sum = 0;
      for (int64_t k = 1; k <= 100; ++k) sum += 1.0 / static_cast<double>(i * k + 1);
      out[static_cast<size_t>(i)] = sum;
    });
    return out;
  };
  engine::SerialExecutor serial;
  const std::vector<double> expected = compute(serial);
  for (const int workers : {1, 2, 3, 8}) {
    WorkerPool pool(workers, 1);
    EXPECT_EQ(compute(pool), expected);
  }
}

TEST(WorkerPoolTest, IdleWorkersHelpALoop) {
  WorkerPool pool(3, 1);
  // Three pieces that wait for each other end only if three threads run them.
  std::atomic<int> inside{0};
  Gate all;
  pool.ParallelFor(3, [&](int64_t /*i*/) {
    if (++inside == 3) all.Open();
    EXPECT_TRUE(all.Wait());
  });
}

TEST(WorkerPoolTest, NestedLoopsEndWithOneWorker) {
  WorkerPool pool(1, 1);
  Gate done;
  std::atomic<int> sum{0};
  Enqueue(pool, MakeJob([&] {
            pool.ParallelFor(4, [&](int64_t) { pool.ParallelFor(4, [&](int64_t) { ++sum; }); });
            done.Open();
          }));
  ASSERT_TRUE(done.Wait());
  EXPECT_EQ(sum, 16);
}

TEST(WorkerPoolTest, JobsRunningEverywhereGetNoHelp) {
  WorkerPool pool(2, 2);
  Gate both;
  std::atomic<int> started{0};
  std::atomic<bool> mixed{false};
  Gate ends[2];
  for (int j = 0; j < 2; ++j) {
    Enqueue(pool, MakeJob(
                      [&] {
                        if (++started == 2) both.Open();
                        EXPECT_TRUE(both.Wait());
                        const auto self = std::this_thread::get_id();
                        pool.ParallelFor(50, [&](int64_t) {
                          if (std::this_thread::get_id() != self && started == 2) mixed = true;
                        });
                        --started;
                      },
                      [&, j](const absl::Status&) { ends[j].Open(); }));
  }
  ASSERT_TRUE(ends[0].Wait());
  ASSERT_TRUE(ends[1].Wait());
  EXPECT_FALSE(mixed);
}

TEST(WorkerPoolTest, ExceptionOfAPieceReachesTheCaller) {
  WorkerPool pool(2, 1);
  EXPECT_THROW(pool.ParallelFor(100,
                                [](int64_t i) {
                                  if (i == 7) throw std::runtime_error("piece 7");
                                }),
               std::runtime_error);
  EXPECT_THROW(pool.ParallelFor(1, [](int64_t) { throw std::bad_alloc(); }), std::bad_alloc);
  // The pool still works.
  std::atomic<int> runs{0};
  pool.ParallelFor(10, [&](int64_t) { ++runs; });
  EXPECT_EQ(runs, 10);
}

TEST(WorkerPoolTest, ThrowingTasksAndJobsBecomeStatuses) {
  WorkerPool pool(1, 4);
  std::vector<absl::StatusCode> codes;
  std::string message;
  const auto record = [&](const absl::Status& status) {
    codes.push_back(status.code());
    message = std::string(status.message());
  };
  for (int kind = 0; kind < 3; ++kind) {
    const auto run = [kind]() -> absl::Status {
      if (kind == 0) throw std::bad_alloc();
      if (kind == 1) throw std::runtime_error("odd");
      throw 7;
    };
    ASSERT_TRUE(pool.Post({.run = run, .done = record}).ok());
    auto job = MakeJob([] {}, record);
    job.run = run;
    Enqueue(pool, std::move(job));
  }
  // An exception of a completion is dropped.
  ASSERT_TRUE(pool.Post({.run = [] { return absl::OkStatus(); },
                         .done = [](const absl::Status&) { throw 1; }})
                  .ok());
  ASSERT_TRUE(pool.Drain(Soon()));
  EXPECT_EQ(std::count(codes.begin(), codes.end(), absl::StatusCode::kResourceExhausted), 2);
  EXPECT_EQ(std::count(codes.begin(), codes.end(), absl::StatusCode::kInternal), 4);
  EXPECT_EQ(codes.size(), 6);
}

TEST(WorkerPoolTest, TasksThenJobsByPriorityThenAge) {
  WorkerPool pool(1, 10);
  Gate started;
  Gate go;
  Enqueue(pool, MakeJob([&] {
            started.Open();
            EXPECT_TRUE(go.Wait());
          }));
  ASSERT_TRUE(started.Wait());
  std::vector<std::string> order;  // one worker: no race
  const auto add = [&](const char* name, int priority) {
    auto job = MakeJob([&order, name] { order.emplace_back(name); });
    job.priority = priority;
    Enqueue(pool, std::move(job));
  };
  add("low", -1);
  add("first", 0);
  add("second", 0);
  add("high", 5);
  ASSERT_TRUE(pool.Post({.run =
                             [&order] {
                               order.emplace_back("task");
                               return absl::OkStatus();
                             },
                         .done = [](const absl::Status&) {}})
                  .ok());
  EXPECT_EQ(pool.queue_depth(), 4);
  go.Open();
  ASSERT_TRUE(pool.Drain(Soon()));
  EXPECT_EQ(order, (std::vector<std::string>{"task", "high", "first", "second", "low"}));
}

TEST(WorkerPoolTest, FullQueueRefusesWithADelay) {
  WorkerPool pool(1, 2);
  auto first = pool.Admit();
  auto second = pool.Admit();
  ASSERT_TRUE(first.ok() && second.ok());
  const auto third = pool.Admit();
  ASSERT_TRUE(absl::IsResourceExhausted(third.status()));
  EXPECT_CONTAINS(third.status().message(), "all 2 places");
  EXPECT_EQ(base::RetryAfterOf(third.status()), base::kRetrySoon);
  first->Release();
  EXPECT_TRUE(pool.Admit().ok());
}

TEST(WorkerPoolTest, AdmittedUploadIsNeverRefused) {
  WorkerPool pool(1, 1);
  auto slot = pool.Admit();
  ASSERT_TRUE(slot.ok());
  EXPECT_FALSE(pool.Admit().ok());
  Gate done;
  ASSERT_TRUE(
      pool.Enqueue(*std::move(slot), MakeJob([] {}, [&](const absl::Status&) { done.Open(); }))
          .ok());
  ASSERT_TRUE(done.Wait());
  // A job that runs has given its slot back.
  EXPECT_TRUE(pool.Admit().ok());
}

TEST(WorkerPoolTest, CancelledQueuedJobEndsAtOnce) {
  WorkerPool pool(1, 3);
  Gate gate;
  Enqueue(pool, MakeBlockingJob(pool, gate));
  absl::Status ended;
  bool ran = false;
  const auto id = Enqueue(
      pool, MakeJob([&] { ran = true; }, [&](absl::Status status) { ended = std::move(status); }));
  pool.Cancel(id, absl::StatusCode::kDeadlineExceeded);
  // The completion has already run, on this thread.
  EXPECT_TRUE(absl::IsDeadlineExceeded(ended)) << ended;
  pool.Cancel(id, absl::StatusCode::kCancelled);
  pool.Cancel(999, absl::StatusCode::kCancelled);
  gate.Open();
  ASSERT_TRUE(pool.Drain(Soon()));
  EXPECT_EQ(pool.queue_depth(), 0);
  EXPECT_FALSE(ran);
}

TEST(WorkerPoolTest, RunningJobIsToldToStop) {
  WorkerPool pool(2, 1);
  Gate never;
  Gate done;
  absl::Status ended;
  const auto id = Enqueue(pool, MakeBlockingJob(pool, never, [&](absl::Status status) {
                            ended = std::move(status);
                            done.Open();
                          }));
  pool.Cancel(id, absl::StatusCode::kCancelled);
  ASSERT_TRUE(done.Wait());
  EXPECT_TRUE(absl::IsCancelled(ended)) << ended;
}

TEST(WorkerPoolTest, TasksRunWhileEveryWorkerHasAJob) {
  WorkerPool pool(1, 1);
  Gate gate;
  Gate running;
  auto job = MakeBlockingJob(pool, gate);
  job.run = [&, inner = job.run] {
    running.Open();
    return inner();
  };
  Enqueue(pool, std::move(job));
  ASSERT_TRUE(running.Wait());
  for (int i = 0; i < 3; ++i) {
    Gate done;
    ASSERT_TRUE(pool.Post({.run = [] { return absl::OkStatus(); },
                           .done = [&](const absl::Status&) { done.Open(); }})
                    .ok());
    EXPECT_TRUE(done.Wait());
  }
  gate.Open();
  EXPECT_TRUE(pool.Drain(Soon()));
}

TEST(WorkerPoolTest, CompletionsMayUseThePool) {
  WorkerPool pool(1, 1);
  Gate done;
  ASSERT_TRUE(pool.Post({.run = [] { return absl::OkStatus(); },
                         .done =
                             [&](const absl::Status&) {
                               Enqueue(pool, MakeJob([] {},
                                                     [&](const absl::Status&) {
                                                       EXPECT_TRUE(pool.Admit().ok());
                                                       done.Open();
                                                     }));
                             }})
                  .ok());
  EXPECT_TRUE(done.Wait());
}

TEST(WorkerPoolTest, DrainRefusesNewWorkAndWaitsForTheOld) {
  WorkerPool pool(1, 2);
  Gate gate;
  Enqueue(pool, MakeBlockingJob(pool, gate));
  auto slot = pool.Admit();
  ASSERT_TRUE(slot.ok());
  EXPECT_TRUE(pool.admitting());
  EXPECT_FALSE(pool.Drain(std::chrono::steady_clock::now()));
  EXPECT_FALSE(pool.admitting());
  EXPECT_TRUE(absl::IsUnavailable(pool.Admit().status()));
  // A job that was admitted before the drain can still be queued.
  Gate done;
  ASSERT_TRUE(
      pool.Enqueue(*std::move(slot), MakeJob([] {}, [&](const absl::Status&) { done.Open(); }))
          .ok());
  gate.Open();
  EXPECT_TRUE(done.Wait());
  EXPECT_TRUE(pool.Drain(Soon()));
}

TEST(WorkerPoolTest, DrainWaitsForPlacesHeld) {
  WorkerPool pool(1, 1);
  auto slot = pool.Admit();
  EXPECT_FALSE(pool.Drain(std::chrono::steady_clock::now()));
  slot->Release();
  EXPECT_TRUE(pool.Drain(Soon()));
}

TEST(WorkerPoolTest, ShutdownCancelsTheRest) {
  std::vector<absl::StatusCode> codes;
  base::Mutex mu;
  const auto record = [&](const absl::Status& status) {
    const base::MutexLock lock(mu);
    codes.push_back(status.code());
  };
  constexpr int kWaiting = 200;
  WorkerPool pool(1, kWaiting + 2);
  Gate never;
  Enqueue(pool, MakeBlockingJob(pool, never, record));
  // The worker is free again while these are being cancelled, and starts none of them.
  for (int i = 0; i < kWaiting; ++i) {
    Enqueue(pool, MakeJob([] { ADD_FAILURE() << "started"; }, record));
  }
  auto slot = pool.Admit();
  pool.Shutdown();
  pool.Shutdown();
  EXPECT_EQ(codes, std::vector(kWaiting + 1, absl::StatusCode::kUnavailable));
  EXPECT_TRUE(absl::IsUnavailable(pool.Enqueue(*std::move(slot), MakeJob([] {})).status()));
  EXPECT_TRUE(absl::IsUnavailable(
      pool.Post({.run = [] { return absl::OkStatus(); }, .done = [](const absl::Status&) {}})));
  // Loops still run, on the caller.
  std::atomic<int> runs{0};
  pool.ParallelFor(5, [&](int64_t) { ++runs; });
  EXPECT_EQ(runs, 5);
}

TEST(WorkerPoolTest, TellsTheObserver) {
  struct Watcher : Observer {
    void QueueChanged(int64_t now, int64_t now_limit) override {
      depth = now;
      limit = now_limit;
    }
    void WorkersChanged(int64_t now, int64_t now_workers) override {
      busy = now;
      workers = now_workers;
    }
    std::atomic<int64_t> depth{-1}, limit{-1}, busy{-1}, workers{-1};
  } watcher;
  WorkerPool pool(1, 3, watcher);
  EXPECT_EQ(watcher.limit, 3);
  EXPECT_EQ(watcher.workers, 1);
  Gate gate;
  Gate running;
  Enqueue(pool, MakeJob([&] {
            running.Open();
            EXPECT_TRUE(gate.Wait());
          }));
  ASSERT_TRUE(running.Wait());
  Enqueue(pool, MakeJob([] {}));
  EXPECT_EQ(watcher.busy, 1);
  EXPECT_EQ(watcher.depth, 1);
  gate.Open();
  pool.Drain(Soon());
  pool.Shutdown();
  EXPECT_EQ(watcher.busy, 0);
  EXPECT_EQ(watcher.depth, 0);
}

}  // namespace
}  // namespace certiq::server
