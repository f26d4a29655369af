// Jobs over restarts, on storage that fails, and under many threads.

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
using certiq::testing::RowBytes;

constexpr int64_t kForever = std::numeric_limits<int64_t>::max();

class JobLifeTest : public ::testing::TestWithParam<StoreKind> {
 protected:
  void SetUp() override {
    server_.options.workers = 1;
    server_.options.observer = &observer_;
    server_.Start();
    ASSERT_FALSE(HasFatalFailure());
    calibration_id_ = Calibrate(server_, layer_);
    ASSERT_NE(calibration_id_, "");
    Settle(*server_);
  }

  JobDesk& desk() { return server_->jobs(); }
  CalibrationCalls calibration() { return CalibrationCalls(server_, calibration_id_); }
  JobRequest Request(const std::string& request_id = "", v1::Method method = v1::METHOD_NEAREST) {
    return JobRequestFor(layer_, calibration_id_, request_id, method);
  }
  std::string MustSubmit(const JobRequest& request) {
    auto job = Submit(*server_, layer_, request);
    EXPECT_TRUE(job.ok()) << job.status();
    return job.ok() ? job->record.id() : "";
  }
  JobView View(const std::string& id) { return ViewOf(*server_, id); }

  struct Finished : Observer {
    void JobFinished(engine::Method /*method*/, JobState /*outcome*/, double /*seconds*/,
                     const engine::LayerCertificate* /*certificate*/) override {
      ++count;
    }
    std::atomic<int> count{0};
  };

  const Layer layer_ = MakeRandomLayer(8, 48, 300);
  engine::Cancellation cancellation_;
  Finished observer_;
  Server server_{GetParam()};
  std::string calibration_id_;
};

TEST_P(JobLifeTest, QueuedAndRunningJobsComeBack) {
  std::string expected;
  {
    const std::string id = MustSubmit(Request("", v1::METHOD_QRONOS));
    ASSERT_EQ(WaitForEnd(*server_, id), v1::JOB_STATE_SUCCEEDED);
    expected = ResultOf(*server_, id)->tensors;
    Settle(*server_);
  }
  // One starts, and goes on once the server stops; one waits behind it.
  Gate starting;
  WorkerPool* const pool = &server_->pool();
  server_.plan.before = [&](StoreWrite write) {
    if (write != StoreWrite::kStartJob) return;
    starting.Open();
    while (pool->admitting()) std::this_thread::yield();
  };
  const std::string running = MustSubmit(Request("running", v1::METHOD_QRONOS));
  ASSERT_TRUE(starting.Wait());
  const std::string queued = MustSubmit(Request("queued", v1::METHOD_QRONOS));
  server_.Stop();
  server_.plan.before = nullptr;
  server_.Start();
  for (const std::string& id : {running, queued}) {
    EXPECT_EQ(WaitForEnd(*server_, id), v1::JOB_STATE_SUCCEEDED);
    EXPECT_EQ(View(id).record.starts(), 1);
    EXPECT_EQ(ResultOf(*server_, id)->tensors, expected);
  }
  // The same again, and what ended is there as it was.
  server_.Restart();
  for (const std::string& id : {running, queued}) {
    EXPECT_EQ(View(id).record.state(), v1::JOB_STATE_SUCCEEDED);
    EXPECT_EQ(ResultOf(*server_, id)->tensors, expected);
  }
}

TEST_P(JobLifeTest, AJobThatTakesTheServerDownIsGivenUp) {
  server_.plan.before = [&](StoreWrite write) {
    // From here on nothing is written, as if the process had ended.
    if (write == StoreWrite::kFinishJob && server_.plan.fail_at < 0) {
      server_.plan.FailFrom(kForever);
    }
  };
  const std::string id = MustSubmit(Request("r"));
  for (int start = 1; start <= kMaxStarts; ++start) {
    const JobView view = WaitFor(*server_, id, [&](const JobView& now) {
      return now.record.starts() == start && server_.plan.fail_at >= 0;
    });
    Settle(*server_);
    EXPECT_EQ(view.record.state(), v1::JOB_STATE_RUNNING);
    EXPECT_EQ(view.record.starts(), start);
    server_.Stop();
    server_.plan.Heal();
    server_.Start();
  }
  ASSERT_EQ(WaitForEnd(*server_, id), v1::JOB_STATE_FAILED);
  EXPECT_CONTAINS(View(id).record.error().message(), "went down 4 times");
  EXPECT_TRUE(desk().Remove({}, id).ok());
}

// Each write of a job's life fails once.
TEST_P(JobLifeTest, AFailingStoreLosesNothing) {
  for (int64_t failing = 0;; ++failing) {
    ASSERT_LT(failing, 50);
    SCOPED_TRACE(failing);
    server_.plan.fail_at = server_.plan.writes + failing;
    const JobRequest request = Request(absl::StrCat("r", failing));
    auto job = Submit(*server_, layer_, request);
    if (!job.ok()) {
      EXPECT_TRUE(absl::IsUnavailable(job.status())) << job.status();
      job = Submit(*server_, layer_, request);
    }
    ASSERT_TRUE(job.ok()) << job.status();
    const std::string id = job->record.id();
    while (!IsFinal(View(id).record.state())) {
      Settle(*server_);
      desk().Tick();
    }
    Settle(*server_);
    const JobRecord record = View(id).record;
    if (record.state() == v1::JOB_STATE_FAILED) {
      // Only the result itself cannot be written later.
      EXPECT_CONTAINS(record.error().message(), "as planned");
    } else {
      EXPECT_EQ(record.state(), v1::JOB_STATE_SUCCEEDED);
      EXPECT_TRUE(ResultOf(*server_, id).ok());
      EXPECT_EQ(record.starts(), 1);
    }
    EXPECT_EQ(observer_.count, failing + 1);
    EXPECT_EQ(calibration().View().jobs, 0);
    EXPECT_EQ(server_->pool().queue_depth(), 0);
    const bool struck = server_.plan.writes > server_.plan.fail_at;
    server_.plan.Heal();
    server_.Restart();
    EXPECT_TRUE(Same(View(id).record, record));
    // The claim that follows a start is none of the next round's writes.
    Settle(*server_);
    if (!struck) break;
  }
}

TEST_P(JobLifeTest, AnEndIsWrittenAndToldOnce) {
  Gate inside;
  Gate go;
  std::atomic<int> ends{0};
  server_.plan.before = [&](StoreWrite write) {
    if (write != StoreWrite::kFinishJob || ++ends > 1) return;
    inside.Open();
    EXPECT_TRUE(go.Wait());
  };
  const std::string id = MustSubmit(Request());
  ASSERT_TRUE(inside.Wait());
  // Looks for ends that could not be written, while one is being written.
  desk().Tick();
  go.Open();
  EXPECT_EQ(WaitForEnd(*server_, id), v1::JOB_STATE_SUCCEEDED);
  Settle(*server_);
  EXPECT_EQ(ends, 1);
  EXPECT_EQ(observer_.count, 1);
}

TEST_P(JobLifeTest, WhatCannotBeStartedCanBeCancelled) {
  server_.plan.before = [&](StoreWrite write) {
    if (write == StoreWrite::kStartJob && server_.plan.fail_at < 0) server_.plan.FailFrom(1);
  };
  const std::string id = MustSubmit(Request());
  Settle(*server_);
  // Until the next tick nothing is started.
  const auto view = desk().Cancel({}, id, absl::StatusCode::kCancelled);
  ASSERT_TRUE(view.ok()) << view.status();
  EXPECT_EQ(view->record.state(), v1::JOB_STATE_CANCELLED);
  EXPECT_EQ(view->record.starts(), 0);
  Settle(*server_);
  EXPECT_EQ(calibration().View().jobs, 0);
}

TEST_P(JobLifeTest, WhatFailsToStartWhileItIsCancelledIsNotStartedAgain) {
  Gate inside;
  Gate go;
  server_.plan.before = [&](StoreWrite write) {
    if (write != StoreWrite::kStartJob) return;
    inside.Open();
    EXPECT_TRUE(go.Wait());
    server_.plan.FailFrom(1);
  };
  const std::string id = MustSubmit(Request());
  ASSERT_TRUE(inside.Wait());
  EXPECT_TRUE(desk().Cancel({}, id, absl::StatusCode::kCancelled).ok());
  go.Open();
  // No tick comes by.
  EXPECT_EQ(WaitForEnd(*server_, id), v1::JOB_STATE_CANCELLED);
  EXPECT_EQ(calibration().View().jobs, 0);
}

TEST_P(JobLifeTest, RemovalThatFailsChangesNothing) {
  const std::string id = MustSubmit(Request("r"));
  ASSERT_EQ(WaitForEnd(*server_, id), v1::JOB_STATE_SUCCEEDED);
  Settle(*server_);
  server_.plan.FailFrom(1);
  EXPECT_TRUE(absl::IsUnavailable(desk().Remove({}, id)));
  EXPECT_EQ(MustSubmit(Request("r")), id);
  EXPECT_TRUE(ResultOf(*server_, id).ok());
  EXPECT_TRUE(desk().Remove({}, id).ok());
  EXPECT_NE(MustSubmit(Request("r")), id);
}

TEST_P(JobLifeTest, NothingStartsWhileItStops) {
  const auto before = desk().Begin({}, Request(), cancellation_);
  ASSERT_TRUE(before.ok());
  server_->StopStarting();
  EXPECT_TRUE(absl::IsUnavailable(desk().Begin({}, Request(), cancellation_).status()));
  ASSERT_TRUE(
      (*before)->AppendWeights(0, RowBytes(layer_.weights, layer_.features, 0, layer_.rows)).ok());
  ASSERT_TRUE((*before)->Finish().ok());
  const auto late = desk().Add({}, **before);
  ASSERT_TRUE(late.ok()) << late.status();
  server_->pool().Poke();
  desk().Tick();
  Settle(*server_);
  EXPECT_EQ(View(late->record.id()).record.state(), v1::JOB_STATE_QUEUED);
}

TEST_P(JobLifeTest, PrioritiesOutliveARestart) {
  constexpr int kJobs = 20;
  std::vector<std::unique_ptr<Upload>> uploads;
  for (int i = 0; i < kJobs; ++i) {
    JobRequest request = Request();
    request.priority = i;
    auto upload = desk().Begin({}, request, cancellation_);
    ASSERT_TRUE(upload.ok()) << upload.status();
    uploads.push_back(*std::move(upload));
  }
  // They get into the store, and none starts.
  server_->StopStarting();
  const auto weights = RowBytes(layer_.weights, layer_.features, 0, layer_.rows);
  std::vector<std::string> ids;
  for (const auto& upload : uploads) {
    ASSERT_TRUE(upload->AppendWeights(0, weights).ok());
    ASSERT_TRUE(upload->Finish().ok());
    const auto job = desk().Add({}, *upload);
    ASSERT_TRUE(job.ok()) << job.status();
    ids.push_back(job->record.id());
  }
  uploads.clear();
  std::mutex mu;
  std::vector<int> order;
  server_.Stop();
  server_.plan.after = [&](StoreWrite write, const JobRecord& record) {
    const std::lock_guard lock(mu);
    if (write == StoreWrite::kStartJob) order.push_back(record.priority());
  };
  server_.Start();
  for (const std::string& id : ids) EXPECT_EQ(WaitForEnd(*server_, id), v1::JOB_STATE_SUCCEEDED);
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
        JobRequest request =
            Request(absl::StrCat("r", t, ".", i), i % 3 == 0 ? v1::METHOD_QRONOS : v1::METHOD_OPTQ);
        request.priority = i;
        if (i % 5 == 4) request.deadline_micros = 1;
        const std::string id = MustSubmit(request);
        if (i % 2 == 1) {
          EXPECT_TRUE(desk().Cancel({}, id, absl::StatusCode::kCancelled).ok());
        }
        const JobState state = WaitForEnd(*server_, id);
        EXPECT_TRUE(IsFinal(state));
        EXPECT_NE(state, v1::JOB_STATE_FAILED) << View(id).record.error().DebugString();
        if (state == v1::JOB_STATE_SUCCEEDED) {
          EXPECT_TRUE(ResultOf(*server_, id).ok());
        }
        if (i % 4 == 0) {
          EXPECT_TRUE(desk().Remove({}, id).ok());
        }
      }
      --left;
    });
  }
  while (left > 0) {
    desk().Tick();
    std::string next;
    EXPECT_TRUE(desk().List({}, {}, "", {.size = 5, .after = {}}, next).ok());
    const auto running =
        desk().List({}, {v1::JOB_STATE_RUNNING}, "", {.size = 5, .after = {}}, next);
    EXPECT_TRUE(running.ok() && running->size() <= 1U);
    std::this_thread::yield();
  }
  for (std::thread& thread : threads) thread.join();
  Settle(*server_);
  EXPECT_EQ(observer_.count, kThreads * kJobs);
  EXPECT_EQ(calibration().View().jobs, 0);
  EXPECT_EQ(server_->pool().queue_depth(), 0);
}

INSTANTIATE_TEST_SUITE_P(Stores, JobLifeTest,
                         ::testing::Values(StoreKind::kKept, StoreKind::kSqlite),
                         [](const auto& about) { return NameOf(about.param); });

}  // namespace
}  // namespace certiq::server::testing
