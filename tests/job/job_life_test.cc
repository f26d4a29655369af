// Jobs over restarts, on stores that fail, and under many threads.

#include <gtest/gtest.h>

#include <atomic>
#include <limits>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "support/backend_examples.h"
#include "support/gate.h"
#include "support/text.h"

namespace certiq::server::testing {
namespace {

using certiq::testing::Gate;
using certiq::testing::Layer;
using certiq::testing::MakeRandomLayer;

constexpr int64_t kForever = std::numeric_limits<int64_t>::max();

class JobLifeTest : public ::testing::TestWithParam<StoreKind> {
 protected:
  void SetUp() override {
    server_.options.workers = 1;
    server_.options.observer = &observer_;
    Start();
    calibration_ = Calibrate(backend(), layer_);
    ASSERT_NE(calibration_, nullptr);
  }

  Backend& backend() { return *server_.operator->(); }
  void Start() { server_.Start(); }
  // What belongs to the backend goes before it.
  void Stop() {
    calibration_ = nullptr;
    server_.Stop();
  }
  std::shared_ptr<StoredJob> MustSubmit(const std::string& request_id, const std::string& spec) {
    auto job = Submit(backend(), layer_, JobRequestFor(layer_, *calibration_, request_id, spec));
    EXPECT_TRUE(job.ok()) << job.status();
    return job.value_or(nullptr);
  }
  std::shared_ptr<StoredJob> Find(const std::string& id) {
    auto job = server_->manager().Find({}, id);
    EXPECT_TRUE(job.ok()) << job.status();
    return job.value_or(nullptr);
  }

  struct Finished : Observer {
    void JobFinished(engine::Method /*method*/, JobState /*outcome*/, double /*seconds*/,
                     const engine::LayerCertificate* /*certificate*/) override {
      ++count;
    }
    std::atomic<int> count{0};
  };

  const Layer layer_ = MakeRandomLayer(8, 48, 300);
  Finished observer_;
  Server server_{GetParam()};
  std::shared_ptr<Calibration> calibration_;
};

TEST_P(JobLifeTest, QueuedAndRunningJobsComeBack) {
  std::vector<std::byte> expected;
  {
    const auto job = MustSubmit("", "qronos");
    ASSERT_EQ(WaitForEnd(*job), JobState::kSucceeded);
    expected = ResultOf(backend(), *job).value();
  }
  // One starts, and goes on once the server stops; one waits behind it.
  Gate starting;
  WorkerPool* const pool = &server_->pool();
  server_.plan.before_put = [&](const JobRecord& record) {
    if (record.state != JobState::kRunning) return;
    starting.Open();
    while (pool->admitting()) std::this_thread::yield();
  };
  const std::string running = MustSubmit("running", "qronos")->id();
  ASSERT_TRUE(starting.Wait());
  const std::string queued = MustSubmit("queued", "qronos")->id();
  Stop();
  server_.plan.before_put = nullptr;
  Start();
  for (const std::string& id : {running, queued}) {
    const auto job = Find(id);
    ASSERT_NE(job, nullptr);
    EXPECT_EQ(WaitForEnd(*job), JobState::kSucceeded);
    EXPECT_EQ(job->View().record.starts, 1);
    EXPECT_EQ(ResultOf(backend(), *job).value(), expected);
  }
  // The same again, and what ended is there as it was.
  Stop();
  Start();
  for (const std::string& id : {running, queued}) {
    const auto job = Find(id);
    ASSERT_NE(job, nullptr);
    EXPECT_EQ(job->View().record.state, JobState::kSucceeded);
    EXPECT_EQ(ResultOf(backend(), *job).value(), expected);
  }
}

TEST_P(JobLifeTest, AJobThatTakesTheServerDownIsGivenUp) {
  server_.plan.before_put = [&](const JobRecord& record) {
    // From here on nothing is written, as if the process had ended.
    if (record.state == JobState::kSucceeded && server_.plan.fail_at < 0) {
      server_.plan.FailFrom(kForever);
    }
  };
  std::string id;
  for (int start = 1; start <= kMaxStarts; ++start) {
    auto job = start == 1 ? MustSubmit("r", "nearest") : Find(id);
    ASSERT_NE(job, nullptr);
    id = job->id();
    Settle(backend());
    const JobView view = WaitFor(*job, [&](const JobView& now) {
      return now.record.starts == start && server_.plan.fail_at >= 0;
    });
    EXPECT_EQ(view.record.state, JobState::kRunning);
    EXPECT_EQ(view.record.starts, start);
    job = nullptr;
    Stop();
    server_.plan.Heal();
    Start();
  }
  const auto job = Find(id);
  ASSERT_EQ(WaitForEnd(*job), JobState::kFailed);
  EXPECT_CONTAINS(job->View().record.error, "went down 4 times");
  EXPECT_TRUE(server_->manager().Remove({}, id).ok());
}

// Each write of a job's life fails once.
TEST_P(JobLifeTest, AFailingStoreLosesNothing) {
  for (int64_t failing = 0;; ++failing) {
    ASSERT_LT(failing, 50);
    SCOPED_TRACE(failing);
    server_.plan.fail_at = server_.plan.writes + failing;
    const JobRequest request =
        JobRequestFor(layer_, *calibration_, absl::StrCat("r", failing), "nearest");
    auto job = Submit(backend(), layer_, request);
    if (!job.ok()) {
      EXPECT_TRUE(absl::IsUnavailable(job.status())) << job.status();
      job = Submit(backend(), layer_, request);
    }
    ASSERT_TRUE(job.ok()) << job.status();
    while (!(*job)->ended()) {
      Settle(backend());
      server_->manager().Tick();
    }
    Settle(backend());
    const JobRecord record = (*job)->View().record;
    if (record.state == JobState::kFailed) {
      // Only the result itself cannot be written later.
      EXPECT_CONTAINS(record.error, "as planned");
    } else {
      EXPECT_EQ(record.state, JobState::kSucceeded);
      EXPECT_TRUE(ResultOf(backend(), **job).ok());
      EXPECT_EQ(record.starts, 1);
    }
    // Who wrote the end may be another than a worker.
    while (observer_.count <= failing) std::this_thread::yield();
    EXPECT_EQ(observer_.count, failing + 1);
    EXPECT_EQ(calibration_->View(false).jobs, 0);
    const bool struck = server_.plan.writes > server_.plan.fail_at;
    server_.plan.Heal();
    const std::string id = (*job)->id();
    const std::string calibration = calibration_->id();
    job = absl::InternalError("gone with its server");
    Stop();
    Start();
    calibration_ = server_->calibrations().FindById(calibration);
    ASSERT_NE(calibration_, nullptr);
    const auto again = Find(id);
    ASSERT_NE(again, nullptr);
    EXPECT_EQ(again->View().record, record);
    if (!struck) break;
  }
}

TEST_P(JobLifeTest, AnEndIsWrittenAndToldOnce) {
  Gate inside;
  Gate go;
  std::atomic<int> ends{0};
  server_.plan.before_put = [&](const JobRecord& record) {
    if (!IsFinal(record.state) || ++ends > 1) return;
    inside.Open();
    EXPECT_TRUE(go.Wait());
  };
  const auto job = MustSubmit("", "nearest");
  ASSERT_TRUE(inside.Wait());
  // Looks for ends that could not be written, while one is being written.
  server_->manager().Tick();
  go.Open();
  EXPECT_EQ(WaitForEnd(*job), JobState::kSucceeded);
  Settle(backend());
  EXPECT_EQ(ends, 1);
  EXPECT_EQ(observer_.count, 1);
}

TEST_P(JobLifeTest, WhatCannotBeStartedCanBeCancelled) {
  server_.plan.before_put = [&](const JobRecord& record) {
    if (record.state == JobState::kRunning && server_.plan.fail_at < 0) server_.plan.FailFrom(1);
  };
  const auto job = MustSubmit("", "nearest");
  Settle(backend());
  job->Cancel(absl::StatusCode::kCancelled);
  // It may have been started again meanwhile, and then it may have succeeded.
  const JobState state = WaitForEnd(*job);
  EXPECT_TRUE(state == JobState::kCancelled || state == JobState::kSucceeded);
  Settle(backend());
  EXPECT_EQ(calibration_->View(false).jobs, 0);
}

TEST_P(JobLifeTest, WhatFailsToStartWhileItIsCancelledIsNotStartedAgain) {
  Gate inside;
  Gate go;
  server_.plan.before_put = [&](const JobRecord& record) {
    if (record.state != JobState::kRunning) return;
    server_.plan.FailFrom(1);
    inside.Open();
    EXPECT_TRUE(go.Wait());
  };
  const auto job = MustSubmit("", "nearest");
  ASSERT_TRUE(inside.Wait());
  job->Cancel(absl::StatusCode::kCancelled);
  go.Open();
  // No tick comes by.
  EXPECT_EQ(WaitForEnd(*job), JobState::kCancelled);
  EXPECT_EQ(calibration_->View(false).jobs, 0);
}

TEST_P(JobLifeTest, RemovalThatFailsChangesNothing) {
  const auto job = MustSubmit("r", "nearest");
  ASSERT_EQ(WaitForEnd(*job), JobState::kSucceeded);
  Settle(backend());
  server_.plan.FailFrom(1);
  EXPECT_TRUE(absl::IsUnavailable(server_->manager().Remove({}, job->id())));
  EXPECT_EQ(MustSubmit("r", "nearest"), job);
  EXPECT_TRUE(ResultOf(backend(), *job).ok());
  EXPECT_TRUE(server_->manager().Remove({}, job->id()).ok());
  EXPECT_NE(MustSubmit("r", "nearest"), job);
}

TEST_P(JobLifeTest, NothingStartsWhileItStops) {
  const auto before = server_->manager().Begin({}, JobRequestFor(layer_, *calibration_));
  ASSERT_TRUE(before.ok());
  server_->StopStarting();
  EXPECT_TRUE(absl::IsUnavailable(
      server_->manager().Begin({}, JobRequestFor(layer_, *calibration_)).status()));
  ASSERT_TRUE(
      (*before)
          ->Append(0, certiq::testing::RowBytes(layer_.weights, layer_.features, 0, layer_.rows))
          .ok());
  const auto late = (*before)->Finish();
  ASSERT_TRUE(late.ok()) << late.status();
  server_->pool().Poke();
  Settle(backend());
  EXPECT_EQ((*late)->View().record.state, JobState::kQueued);
}

TEST_P(JobLifeTest, PrioritiesOutliveARestart) {
  constexpr int kJobs = 20;
  std::vector<std::unique_ptr<JobUpload>> uploads;
  for (int i = 0; i < kJobs; ++i) {
    JobRequest request = JobRequestFor(layer_, *calibration_);
    request.priority = i;
    auto upload = server_->manager().Begin({}, request);
    ASSERT_TRUE(upload.ok()) << upload.status();
    uploads.push_back(*std::move(upload));
  }
  // They get into the store, and none starts.
  server_->StopStarting();
  const auto weights = certiq::testing::RowBytes(layer_.weights, layer_.features, 0, layer_.rows);
  std::vector<std::string> ids;
  for (const auto& upload : uploads) {
    ASSERT_TRUE(upload->Append(0, weights).ok());
    const auto job = upload->Finish();
    ASSERT_TRUE(job.ok()) << job.status();
    ids.push_back((*job)->id());
  }
  uploads.clear();
  std::mutex mu;
  std::vector<int> order;
  Stop();
  server_.plan.before_put = [&](const JobRecord& record) {
    const std::lock_guard lock(mu);
    if (record.state == JobState::kRunning) order.push_back(record.priority);
  };
  Start();
  for (const std::string& id : ids) {
    const auto job = Find(id);
    ASSERT_NE(job, nullptr);
    EXPECT_EQ(WaitForEnd(*job), JobState::kSucceeded);
  }
  std::vector<int> wanted;
  for (int i = kJobs - 1; i >= 0; --i) wanted.push_back(i);
  EXPECT_EQ(order, wanted);
}

// Create, cancel, watch, list and remove, all at once.
TEST_P(JobLifeTest, ManyThreads) {
  constexpr int kThreads = 3;
  constexpr int kJobs = 12;
  std::vector<std::thread> threads;
  threads.reserve(kThreads);
  std::atomic<int> left{kThreads};
  for (int t = 0; t < kThreads; ++t) {
    threads.emplace_back([&, t] {
      for (int i = 0; i < kJobs; ++i) {
        JobRequest request = JobRequestFor(layer_, *calibration_, absl::StrCat("r", t, ".", i),
                                           i % 3 == 0 ? "qronos" : "optq");
        request.priority = i;
        if (i % 5 == 4) request.deadline_micros = 1;
        const auto job = Submit(backend(), layer_, request);
        ASSERT_TRUE(job.ok()) << job.status();
        if (i % 2 == 1) (*job)->Cancel(absl::StatusCode::kCancelled);
        const JobState state = WaitForEnd(**job);
        EXPECT_TRUE(IsFinal(state));
        EXPECT_NE(state, JobState::kFailed) << (*job)->View().record.error;
        if (state == JobState::kSucceeded) {
          EXPECT_TRUE(ResultOf(backend(), **job).ok());
        }
        if (i % 4 == 0) {
          EXPECT_TRUE(server_->manager().Remove({}, (*job)->id()).ok());
        }
      }
      --left;
    });
  }
  while (left > 0) {
    server_->manager().Tick();
    EXPECT_TRUE(server_->manager().List({}, {}, "", 5, "").ok());
    EXPECT_LE(server_->manager().running(), 1);
    std::this_thread::yield();
  }
  for (std::thread& thread : threads) thread.join();
  Settle(backend());
  EXPECT_EQ(observer_.count, kThreads * kJobs);
  EXPECT_EQ(calibration_->View(false).jobs, 0);
}

INSTANTIATE_TEST_SUITE_P(Stores, JobLifeTest,
                         ::testing::Values(StoreKind::kKept, StoreKind::kSqlite),
                         [](const auto& about) { return NameOf(about.param); });

}  // namespace
}  // namespace certiq::server::testing
