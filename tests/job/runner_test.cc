#include "job/runner.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "base/clock.h"
#include "contract/resolve_spec.h"
#include "job/admission.h"
#include "support/backend_examples.h"
#include "support/gate.h"
#include "support/text.h"

namespace certiq::server::testing {
namespace {

using certiq::testing::Gate;
using certiq::testing::Layer;
using certiq::testing::MakeBlockingJob;
using certiq::testing::MakeRandomLayer;

// What observers hear of jobs.
class JobWatcher : public Observer {
 public:
  void JobEntered(JobState state) override { Count(state, 1); }
  void JobLeft(JobState state) override { Count(state, -1); }
  void JobFinished(engine::Method /*method*/, JobState outcome, double /*seconds*/,
                   const engine::LayerCertificate* certificate) override {
    const std::lock_guard lock(mu_);
    EXPECT_EQ(certificate != nullptr, outcome == v1::JOB_STATE_SUCCEEDED);
    outcomes_.push_back(outcome);
  }

  std::vector<JobState> outcomes() {
    const std::lock_guard lock(mu_);
    return outcomes_;
  }
  // How many jobs are counted in a state.
  int in(JobState state) {
    const std::lock_guard lock(mu_);
    return states_[state];
  }

 private:
  void Count(JobState state, int change) {
    const std::lock_guard lock(mu_);
    states_[state] += change;
  }
  std::mutex mu_;
  std::vector<JobState> outcomes_;
  std::map<JobState, int> states_;
};

class RunnerTest : public ::testing::TestWithParam<StoreKind> {
 protected:
  void SetUp() override {
    server_.options.workers = 1;
    server_.options.observer = &watcher_;
    server_.options.job_log = [this](const JobRecord& job, const absl::Status& status) {
      EXPECT_TRUE(IsFinal(job.state()));
      EXPECT_EQ(status.ok(), job.state() == v1::JOB_STATE_SUCCEEDED);
      ++logged_;
    };
    server_.Start();
    ASSERT_FALSE(HasFatalFailure());
    calibration_id_ = Calibrate(server_, layer_);
    ASSERT_NE(calibration_id_, "");
    Settle(*server_);
  }
  void TearDown() override {
    gate_.Open();
    server_.Stop();
  }

  JobDesk& desk() { return server_->jobs(); }
  std::string Submit(int priority = 0, int64_t deadline_micros = 0) {
    JobRequest request = JobRequestFor(layer_, calibration_id_);
    request.priority = priority;
    request.deadline_micros = deadline_micros;
    const auto job = testing::Submit(*server_, layer_, request);
    EXPECT_TRUE(job.ok()) << job.status();
    return job.ok() ? job->record.id() : "";
  }
  JobRecord Record(const std::string& id) { return ViewOf(*server_, id).record; }
  JobState End(const std::string& id) { return WaitForEnd(*server_, id); }
  absl::StatusOr<JobView> Cancel(const std::string& id) {
    return desk().Cancel({}, id, absl::StatusCode::kCancelled);
  }
  // Keeps the only worker until gate_ opens; tasks, claims among them, run meanwhile.
  void Block() {
    auto slot = server_->pool().Admit();
    ASSERT_TRUE(slot.ok());
    auto inside = std::make_shared<Gate>();
    WorkerPool::Job job = MakeBlockingJob(server_->pool(), gate_);
    job.run = [inside, run = std::move(job.run)] {
      inside->Open();
      return run();
    };
    ASSERT_TRUE(server_->pool().Enqueue(*std::move(slot), std::move(job)).ok());
    ASSERT_TRUE(inside->Wait());
  }
  // Runs `then` after, or before, the first write of this kind; `server_` runs nothing yet.
  void AfterFirst(StoreWrite write, std::function<void(const JobRecord&)> then) {
    server_.plan.after = [write, then = std::move(then),
                          first = std::make_shared<std::atomic_flag>()](StoreWrite written,
                                                                        const JobRecord& record) {
      if (written == write && !first->test_and_set()) then(record);
    };
  }
  void BeforeFirst(StoreWrite write, std::function<void()> then) {
    server_.plan.before = [write, then = std::move(then),
                           first = std::make_shared<std::atomic_flag>()](StoreWrite coming) {
      if (coming == write && !first->test_and_set()) then();
    };
  }
  // Everything that was submitted has ended, and nothing is held for it.
  void ExpectNothingHeld(size_t ended) {
    Settle(*server_);
    EXPECT_EQ(watcher_.outcomes().size(), ended);
    EXPECT_EQ(logged_, static_cast<int>(ended));
    EXPECT_EQ(watcher_.in(v1::JOB_STATE_QUEUED), 0);
    EXPECT_EQ(watcher_.in(v1::JOB_STATE_RUNNING), 0);
    EXPECT_EQ(server_->pool().queue_depth(), 0);
    EXPECT_EQ(CalibrationCalls(server_, calibration_id_).View().jobs, 0);
    // All places in the queue are free, and the tenant's share of jobs is.
    EXPECT_TRUE(
        server_->pool().Drain(std::chrono::steady_clock::now() + certiq::testing::kPatience));
    EXPECT_TRUE(server_->environment().quotas.Of(Tenant{"", {.jobs = 1}}).jobs.Take("jobs").ok());
  }

  const Layer layer_ = MakeRandomLayer(6, 32, 200);
  JobWatcher watcher_;
  std::atomic<int> logged_{0};
  Gate gate_;
  Server server_{GetParam()};
  std::string calibration_id_;
};

// One waits here, claimed, for the worker; the one of a higher priority that comes is first.
TEST_P(RunnerTest, AHigherPriorityTakesThePlaceOfTheOneThatWaits) {
  Gate claimed;
  std::mutex mu;
  std::vector<std::string> started;
  std::vector<std::string> released;
  server_.plan.after = [&](StoreWrite write, const JobRecord& job) {
    const std::lock_guard lock(mu);
    if (write == StoreWrite::kClaimJob) claimed.Open();
    if (write == StoreWrite::kStartJob) started.push_back(job.id());
    if (write == StoreWrite::kReleaseJob) released.push_back(job.id());
  };
  Block();
  const std::string low = Submit(-1);
  ASSERT_TRUE(claimed.Wait());
  const std::string equal = Submit(-1);
  const std::string high = Submit(1);
  EXPECT_EQ(ViewOf(*server_, low).queue_position, 1);
  EXPECT_EQ(server_->pool().queue_depth(), 3);
  gate_.Open();
  for (const std::string& id : {low, equal, high}) EXPECT_EQ(End(id), v1::JOB_STATE_SUCCEEDED);
  EXPECT_EQ(started, (std::vector{high, low, equal}));
  EXPECT_EQ(released, std::vector{low});
  EXPECT_EQ(Record(low).starts(), 1);
  ExpectNothingHeld(3);
}

// The higher one comes when the lower one has been claimed and nobody knows it yet.
TEST_P(RunnerTest, AHigherPriorityThatComesDuringAClaimGoesFirst) {
  Gate submitted;
  AfterFirst(StoreWrite::kClaimJob,
             [&](const JobRecord& /*job*/) { EXPECT_TRUE(submitted.Wait()); });
  std::mutex mu;
  std::vector<std::string> started;
  auto after = server_.plan.after;
  server_.plan.after = [&](StoreWrite write, const JobRecord& job) {
    if (write == StoreWrite::kStartJob) {
      const std::lock_guard lock(mu);
      started.push_back(job.id());
    }
    after(write, job);
  };
  const std::string low = Submit(0);
  const std::string high = Submit(5);
  submitted.Open();
  for (const std::string& id : {low, high}) EXPECT_EQ(End(id), v1::JOB_STATE_SUCCEEDED);
  EXPECT_EQ(started, (std::vector{high, low}));
  ExpectNothingHeld(2);
}

// A job that has begun to start is not given back.
TEST_P(RunnerTest, WhatStartsIsNotGivenBack) {
  Gate starting;
  Gate go;
  BeforeFirst(StoreWrite::kStartJob, [&] {
    starting.Open();
    EXPECT_TRUE(go.Wait());
  });
  std::atomic<int> released{0};
  server_.plan.after = [&](StoreWrite write, const JobRecord& /*job*/) {
    if (write == StoreWrite::kReleaseJob) ++released;
  };
  const std::string low = Submit(0);
  ASSERT_TRUE(starting.Wait());
  const std::string high = Submit(5);
  go.Open();
  for (const std::string& id : {low, high}) EXPECT_EQ(End(id), v1::JOB_STATE_SUCCEEDED);
  EXPECT_EQ(released, 0);
  ExpectNothingHeld(2);
}

// Every job of a lower priority than the next; the last comes first, whatever is claimed meanwhile.
TEST_P(RunnerTest, ManyPrioritiesInTurn) {
  std::mutex mu;
  std::vector<int> order;
  server_.plan.after = [&](StoreWrite write, const JobRecord& job) {
    const std::lock_guard lock(mu);
    if (write == StoreWrite::kStartJob) order.push_back(job.priority());
  };
  Block();
  std::vector<std::string> ids;
  for (int i = 0; i < 12; ++i) {
    ids.push_back(Submit(i));
    if (i % 3 == 0) RunTasks(*server_);
  }
  gate_.Open();
  for (const std::string& id : ids) EXPECT_EQ(End(id), v1::JOB_STATE_SUCCEEDED);
  EXPECT_EQ(order, (std::vector<int>{11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0}));
  ExpectNothingHeld(12);
}

TEST_P(RunnerTest, CancelledBeforeItIsClaimed) {
  Gate cancelled;
  BeforeFirst(StoreWrite::kClaimJob, [&] { EXPECT_TRUE(cancelled.Wait()); });
  const std::string id = Submit();
  const auto view = Cancel(id);
  ASSERT_TRUE(view.ok()) << view.status();
  EXPECT_EQ(view->record.state(), v1::JOB_STATE_CANCELLED);
  cancelled.Open();
  ExpectNothingHeld(1);
  EXPECT_EQ(Record(id).starts(), 0);
}

TEST_P(RunnerTest, CancelledWhileItIsClaimed) {
  Gate claimed;
  Gate cancelled;
  AfterFirst(StoreWrite::kClaimJob, [&](const JobRecord& /*job*/) {
    claimed.Open();
    EXPECT_TRUE(cancelled.Wait());
  });
  const std::string id = Submit();
  ASSERT_TRUE(claimed.Wait());
  const auto view = Cancel(id);
  ASSERT_TRUE(view.ok()) << view.status();
  cancelled.Open();
  EXPECT_EQ(End(id), v1::JOB_STATE_CANCELLED);
  ExpectNothingHeld(1);
  EXPECT_EQ(Record(id).starts(), 0);
}

TEST_P(RunnerTest, CancelledWhileItWaitsForMemory) {
  Block();
  const std::string id = Submit();
  RunTasks(*server_);
  ByteBudget& memory = server_->memory();
  auto others = memory.TryReserve(memory.capacity() - memory.reserved(), "others");
  ASSERT_TRUE(others.ok());
  gate_.Open();
  Settle(*server_);
  EXPECT_EQ(Record(id).state(), v1::JOB_STATE_QUEUED);
  EXPECT_NE(Record(id).owner(), "");
  const auto view = Cancel(id);
  ASSERT_TRUE(view.ok()) << view.status();
  EXPECT_EQ(view->record.state(), v1::JOB_STATE_CANCELLED);
  ExpectNothingHeld(1);
}

TEST_P(RunnerTest, CancelledOnceItHasStarted) {
  Gate started;
  Gate cancelled;
  AfterFirst(StoreWrite::kStartJob, [&](const JobRecord& /*job*/) {
    started.Open();
    EXPECT_TRUE(cancelled.Wait());
  });
  const std::string id = Submit();
  ASSERT_TRUE(started.Wait());
  const auto view = Cancel(id);
  ASSERT_TRUE(view.ok()) << view.status();
  EXPECT_EQ(view->record.state(), v1::JOB_STATE_RUNNING);
  cancelled.Open();
  EXPECT_EQ(End(id), v1::JOB_STATE_CANCELLED);
  EXPECT_EQ(Record(id).starts(), 1);
  EXPECT_FALSE(Record(id).has_result());
  ExpectNothingHeld(1);
}

// It has its result, only the end is not written: it stays a success.
TEST_P(RunnerTest, CancelledWhileItsEndCannotBeWritten) {
  BeforeFirst(StoreWrite::kFinishJob, [&] { server_.plan.FailFrom(1); });
  const std::string id = Submit();
  WaitFor(*server_, id,
          [](const JobView& view) { return view.record.state() == v1::JOB_STATE_RUNNING; });
  Settle(*server_);
  EXPECT_EQ(Record(id).state(), v1::JOB_STATE_RUNNING);
  const auto view = Cancel(id);
  ASSERT_TRUE(view.ok()) << view.status();
  EXPECT_EQ(view->record.state(), v1::JOB_STATE_RUNNING);
  desk().Tick();
  EXPECT_EQ(End(id), v1::JOB_STATE_SUCCEEDED);
  EXPECT_TRUE(ResultOf(*server_, id).ok());
  ExpectNothingHeld(1);
}

// Who asked for its end while it was given back is not left waiting for the next claim.
TEST_P(RunnerTest, CancelledWhileItIsGivenBack) {
  Gate claimed;
  server_.plan.after = [&](StoreWrite write, const JobRecord& /*job*/) {
    if (write == StoreWrite::kClaimJob) claimed.Open();
  };
  std::string low;
  BeforeFirst(StoreWrite::kReleaseJob, [&] { EXPECT_TRUE(Cancel(low).ok()); });
  Block();
  low = Submit(0);
  ASSERT_TRUE(claimed.Wait());
  RunTasks(*server_);
  const std::string high = Submit(1);
  EXPECT_EQ(End(low), v1::JOB_STATE_CANCELLED);
  EXPECT_EQ(Record(high).state(), v1::JOB_STATE_QUEUED);
  gate_.Open();
  EXPECT_EQ(End(high), v1::JOB_STATE_SUCCEEDED);
  ExpectNothingHeld(2);
}

TEST_P(RunnerTest, ADeadlineEndsWhatWaitsAndWhatRuns) {
  Gate started;
  Gate late;
  AfterFirst(StoreWrite::kStartJob, [&](const JobRecord& /*job*/) {
    started.Open();
    EXPECT_TRUE(late.Wait());
  });
  const std::string running = Submit(0, /*deadline_micros=*/1);
  ASSERT_TRUE(started.Wait());
  const std::string waiting = Submit(0, /*deadline_micros=*/1);
  while (base::Now() <= Record(waiting).deadline_time()) std::this_thread::yield();
  desk().Tick();
  EXPECT_EQ(Record(waiting).state(), v1::JOB_STATE_EXPIRED);
  EXPECT_EQ(Record(running).state(), v1::JOB_STATE_RUNNING);
  late.Open();
  EXPECT_EQ(End(running), v1::JOB_STATE_EXPIRED);
  ExpectNothingHeld(2);
}

TEST_P(RunnerTest, AClaimThatFailsIsTriedAgain) {
  BeforeFirst(StoreWrite::kClaimJob, [&] { server_.plan.FailFrom(1); });
  const std::string id = Submit();
  Settle(*server_);
  EXPECT_EQ(Record(id).state(), v1::JOB_STATE_QUEUED);
  EXPECT_EQ(Record(id).owner(), "");
  desk().Tick();
  EXPECT_EQ(End(id), v1::JOB_STATE_SUCCEEDED);
  ExpectNothingHeld(1);
}

// The job is claimed, and the runner does not know: the same claim, repeated, finds it.
TEST_P(RunnerTest, AClaimWhoseAnswerIsLostIsRepeated) {
  server_.plan.lost_claims = 1;
  const std::string id = Submit();
  Settle(*server_);
  EXPECT_NE(Record(id).owner(), "");
  desk().Tick();
  EXPECT_EQ(End(id), v1::JOB_STATE_SUCCEEDED);
  ExpectNothingHeld(1);
}

// A disk that cannot be read for a moment ends no job.
TEST_P(RunnerTest, AClaimWhoseCalibrationCannotBeReadIsTriedAgain) {
  AfterFirst(StoreWrite::kClaimJob,
             [&](const JobRecord& /*job*/) { server_.plan.failing_reads = 1; });
  BeforeFirst(StoreWrite::kReleaseJob, [&] { gate_.Open(); });
  const std::string id = Submit();
  ASSERT_TRUE(gate_.Wait());
  Settle(*server_);
  EXPECT_EQ(Record(id).state(), v1::JOB_STATE_QUEUED);
  EXPECT_EQ(Record(id).owner(), "");
  desk().Tick();
  EXPECT_EQ(End(id), v1::JOB_STATE_SUCCEEDED);
  EXPECT_EQ(Record(id).starts(), 1);
  ExpectNothingHeld(1);
}

TEST_P(RunnerTest, AStartThatFailsIsTriedAgain) {
  BeforeFirst(StoreWrite::kStartJob, [&] { server_.plan.FailFrom(1); });
  const std::string id = Submit();
  Settle(*server_);
  EXPECT_EQ(Record(id).state(), v1::JOB_STATE_QUEUED);
  EXPECT_EQ(Record(id).starts(), 0);
  EXPECT_EQ(Record(id).owner(), "");
  EXPECT_EQ(server_->pool().queue_depth(), 1);
  desk().Tick();
  EXPECT_EQ(End(id), v1::JOB_STATE_SUCCEEDED);
  EXPECT_EQ(Record(id).starts(), 1);
  ExpectNothingHeld(1);
}

TEST_P(RunnerTest, AJobThatCannotBeGivenBackIsGivenBackLater) {
  BeforeFirst(StoreWrite::kStartJob, [&] { server_.plan.FailFrom(2); });
  const std::string id = Submit();
  Settle(*server_);
  EXPECT_EQ(Record(id).state(), v1::JOB_STATE_QUEUED);
  EXPECT_NE(Record(id).owner(), "");
  desk().Tick();
  EXPECT_EQ(End(id), v1::JOB_STATE_SUCCEEDED);
  EXPECT_EQ(Record(id).starts(), 1);
  ExpectNothingHeld(1);
}

TEST_P(RunnerTest, AnEndThatFailsIsWrittenLater) {
  // The failures are not those of adding a job.
  Gate submitted;
  BeforeFirst(StoreWrite::kFinishJob, [&] {
    EXPECT_TRUE(submitted.Wait());
    server_.plan.FailFrom(2);
  });
  const std::string id = Submit();
  const std::string next = Submit();
  submitted.Open();
  Settle(*server_);
  EXPECT_EQ(Record(id).state(), v1::JOB_STATE_RUNNING);
  for (const std::string& one : {id, next}) {
    while (!IsFinal(Record(one).state())) {
      desk().Tick();
      Settle(*server_);
    }
    EXPECT_EQ(Record(one).state(), v1::JOB_STATE_SUCCEEDED);
    EXPECT_EQ(Record(one).starts(), 1);
  }
  EXPECT_EQ(watcher_.outcomes(), (std::vector{v1::JOB_STATE_SUCCEEDED, v1::JOB_STATE_SUCCEEDED}));
  EXPECT_TRUE(ResultOf(*server_, id).ok());
  ExpectNothingHeld(2);
}

TEST_P(RunnerTest, AResultThatCannotBeWrittenEndsTheJob) {
  for (const StoreWrite write : {StoreWrite::kCreateBlob, StoreWrite::kCommitBlob}) {
    std::atomic<bool> armed{false};
    server_.plan.before = [&](StoreWrite coming) {
      if (coming == StoreWrite::kStartJob) armed = true;
      if (coming == write && armed.exchange(false)) server_.plan.FailFrom(1);
    };
    const std::string id = Submit();
    EXPECT_EQ(End(id), v1::JOB_STATE_FAILED);
    EXPECT_CONTAINS(Record(id).error().message(), "as planned");
    EXPECT_FALSE(Record(id).has_result());
    Settle(*server_);
    server_.plan.Heal();
    server_.plan.before = nullptr;
  }
  ExpectNothingHeld(2);
}

// The disk is full when the result is to be written, `runs` times; what starts is counted.
class NoRoomForResults {
 public:
  NoRoomForResults(StorePlan& plan, int runs) : plan_(plan) {
    plan_.code = static_cast<int>(absl::StatusCode::kResourceExhausted);
    plan_.before = [this, runs](StoreWrite coming) {
      if (coming == StoreWrite::kStartJob) armed_ = ++started_ <= runs;
      if (coming == StoreWrite::kCreateBlob && armed_.exchange(false)) plan_.FailFrom(1);
    };
  }
  ~NoRoomForResults() { plan_.before = nullptr; }
  NoRoomForResults(const NoRoomForResults&) = delete;
  NoRoomForResults& operator=(const NoRoomForResults&) = delete;

  int started() const { return started_; }

 private:
  StorePlan& plan_;
  std::atomic<int> started_{0};
  std::atomic<bool> armed_{false};
};

TEST_P(RunnerTest, AResultWaitsForRoomOnTheDisk) {
  Block();
  const std::string id = Submit();
  // The plan is read by whoever claims.
  RunTasks(*server_);
  {
    const NoRoomForResults full(server_.plan, 1);
    server_.plan.no_room = true;
    gate_.Open();
    Settle(*server_);
    const std::string next = Submit();
    for (int tick = 0; tick < 3; ++tick) {
      EXPECT_EQ(Record(id).state(), v1::JOB_STATE_QUEUED);
      EXPECT_EQ(Record(id).owner(), "");
      EXPECT_EQ(Record(id).starts(), 0);
      EXPECT_TRUE(Record(id).has_weights());
      EXPECT_EQ(full.started(), 1) << "nothing runs for nothing";
      desk().Tick();
      Settle(*server_);
    }
    server_.plan.no_room = false;
    desk().Tick();
    EXPECT_EQ(End(id), v1::JOB_STATE_SUCCEEDED);
    EXPECT_EQ(End(next), v1::JOB_STATE_SUCCEEDED);
    Settle(*server_);
    EXPECT_EQ(Record(id).starts(), 1);
  }
  EXPECT_TRUE(ResultOf(*server_, id).ok());
  ExpectNothingHeld(2);
}

TEST_P(RunnerTest, AResultThatNeverFindsRoomEndsTheJob) {
  Block();
  const std::string id = Submit();
  // The plan is read by whoever claims.
  RunTasks(*server_);
  {
    const NoRoomForResults full(server_.plan, 100);
    gate_.Open();
    Settle(*server_);
    // There seems to be room each time.
    while (!IsFinal(Record(id).state())) {
      ASSERT_LT(full.started(), 10);
      desk().Tick();
      Settle(*server_);
    }
    EXPECT_EQ(full.started(), 4);
  }
  EXPECT_EQ(Record(id).state(), v1::JOB_STATE_FAILED);
  EXPECT_EQ(Record(id).error().code(), static_cast<int>(absl::StatusCode::kResourceExhausted));
  EXPECT_CONTAINS(Record(id).error().message(), "no room for the result, in 4 runs");
  EXPECT_FALSE(Record(id).has_weights());
  EXPECT_EQ(End(Submit()), v1::JOB_STATE_SUCCEEDED);
  ExpectNothingHeld(2);
}

TEST_P(RunnerTest, WhatWaitsForRoomCanBeCancelled) {
  Block();
  const std::string id = Submit();
  // The plan is read by whoever claims.
  RunTasks(*server_);
  const NoRoomForResults full(server_.plan, 1);
  server_.plan.no_room = true;
  gate_.Open();
  Settle(*server_);
  const std::string next = Submit();
  Settle(*server_);
  EXPECT_EQ(full.started(), 1);
  EXPECT_EQ(Record(id).state(), v1::JOB_STATE_QUEUED);
  EXPECT_TRUE(Cancel(id).ok());
  EXPECT_EQ(Record(id).state(), v1::JOB_STATE_CANCELLED);
  // What waited behind it does not wait for its room.
  desk().Tick();
  EXPECT_EQ(End(next), v1::JOB_STATE_SUCCEEDED);
  ExpectNothingHeld(2);
}

TEST_P(RunnerTest, AShutdownGivesBackWhatRunsUncounted) {
  if (GetParam() == StoreKind::kMemory) return;  // Nothing survives.
  Gate started;
  WorkerPool* const pool = &server_->pool();
  AfterFirst(StoreWrite::kStartJob, [&](const JobRecord& /*job*/) {
    started.Open();
    while (pool->admitting()) std::this_thread::yield();
  });
  const std::string running = Submit();
  ASSERT_TRUE(started.Wait());
  const std::string waiting = Submit();
  server_.Stop();
  server_.options.workers = 2;
  server_.Start();
  for (const std::string& id : {running, waiting}) {
    EXPECT_EQ(End(id), v1::JOB_STATE_SUCCEEDED);
    EXPECT_EQ(Record(id).starts(), 1);
  }
}

// The job is claimed, and the pool takes nothing any more.
TEST_P(RunnerTest, AShutdownDuringAClaimGivesTheJobBack) {
  if (GetParam() == StoreKind::kMemory) return;  // Nothing survives.
  Gate claimed;
  WorkerPool* const pool = &server_->pool();
  AfterFirst(StoreWrite::kClaimJob, [&](const JobRecord& /*job*/) {
    claimed.Open();
    while (pool->admitting()) std::this_thread::yield();
  });
  const std::string id = Submit();
  ASSERT_TRUE(claimed.Wait());
  server_.Stop();
  server_.Start();
  EXPECT_EQ(End(id), v1::JOB_STATE_SUCCEEDED);
  EXPECT_EQ(Record(id).starts(), 1);
}

TEST_P(RunnerTest, WhatIsCancelledWhileItIsClaimedInAShutdownEnds) {
  if (GetParam() == StoreKind::kMemory) return;  // Nothing survives.
  Gate claimed;
  Gate cancelled;
  WorkerPool* const pool = &server_->pool();
  AfterFirst(StoreWrite::kClaimJob, [&](const JobRecord& /*job*/) {
    claimed.Open();
    EXPECT_TRUE(cancelled.Wait());
    while (pool->admitting()) std::this_thread::yield();
  });
  const std::string id = Submit();
  ASSERT_TRUE(claimed.Wait());
  EXPECT_TRUE(Cancel(id).ok());
  cancelled.Open();
  server_.Stop();
  server_.Start();
  EXPECT_EQ(Record(id).state(), v1::JOB_STATE_CANCELLED);
}

TEST_P(RunnerTest, StoppingStartsNothingAndCancelsStill) {
  Block();
  const std::string first = Submit();
  const std::string second = Submit();
  server_->StopStarting();
  gate_.Open();
  Settle(*server_);
  EXPECT_EQ(Record(first).state(), v1::JOB_STATE_QUEUED);
  EXPECT_EQ(Record(second).state(), v1::JOB_STATE_QUEUED);
  for (const std::string& id : {second, first}) {
    EXPECT_EQ(Cancel(id)->record.state(), v1::JOB_STATE_CANCELLED);
  }
  ExpectNothingHeld(2);
}

// A worker each, as long as there is memory; what does not fit waits for what runs.
TEST_P(RunnerTest, MemoryDecidesHowManyRun) {
  server_.Stop();
  if (GetParam() == StoreKind::kMemory) return;  // Its calibration is gone.
  server_.options.workers = 2;
  server_.Start();
  Settle(*server_);
  Gate both;
  std::atomic<int> running{0};
  // Results are written while the memory is still held; uploads are written by this thread.
  server_.plan.before = [&, uploader = std::this_thread::get_id()](StoreWrite write) {
    if (write != StoreWrite::kCreateBlob || std::this_thread::get_id() == uploader) return;
    if (++running == 2) both.Open();
    EXPECT_TRUE(both.Wait());
  };
  const std::string first = Submit();
  const std::string second = Submit();
  EXPECT_EQ(End(first), v1::JOB_STATE_SUCCEEDED);
  EXPECT_EQ(End(second), v1::JOB_STATE_SUCCEEDED);
  Settle(*server_);

  // Room for one.
  std::atomic<int> most{0};
  running = 0;
  server_.plan.after = [&](StoreWrite write, const JobRecord& /*job*/) {
    if (write == StoreWrite::kStartJob) most = std::max<int>(most, ++running);
  };
  server_.plan.before = [&, uploader = std::this_thread::get_id()](StoreWrite write) {
    if (write == StoreWrite::kCommitBlob && std::this_thread::get_id() != uploader) --running;
  };
  const auto spec = ResolveSpec(SpecOf(v1::METHOD_NEAREST));
  const int64_t need = RunBytes(layer_.rows, layer_.features, *spec,
                                CalibrationCalls(server_, calibration_id_).View().record);
  ByteBudget& memory = server_->memory();
  auto others =
      memory.TryReserve(memory.capacity() - memory.reserved() - need - need / 2, "others");
  ASSERT_TRUE(others.ok()) << others.status();
  std::vector<std::string> ids;
  ids.reserve(6);
  for (int i = 0; i < 6; ++i) ids.push_back(Submit());
  for (const std::string& id : ids) EXPECT_EQ(End(id), v1::JOB_STATE_SUCCEEDED);
  Settle(*server_);
  EXPECT_EQ(most, 1);
}

// A spec that is not understood any more, and a calibration that is gone, end their job.
TEST_P(RunnerTest, AJobThatCannotRunEnds) {
  JobRequest request = JobRequestFor(layer_, calibration_id_);
  request.spec_message.set_bits(77);
  const auto job = testing::Submit(*server_, layer_, request);
  ASSERT_TRUE(job.ok()) << job.status();
  EXPECT_EQ(End(job->record.id()), v1::JOB_STATE_FAILED);
  EXPECT_CONTAINS(Record(job->record.id()).error().message(), "spec.bits");
  const std::string next = Submit();
  EXPECT_EQ(End(next), v1::JOB_STATE_SUCCEEDED);
  ExpectNothingHeld(2);
}

// Jobs of random priorities, cancelled at random, from several threads, on two workers.
TEST_P(RunnerTest, PrioritiesAndCancelsFromManyThreads) {
  server_.Stop();
  if (GetParam() == StoreKind::kMemory) return;  // Its calibration is gone.
  server_.options.workers = 2;
  server_.Start();
  constexpr int kThreads = 3;
  constexpr int kJobs = 20;
  std::vector<std::thread> threads;
  threads.reserve(kThreads);
  for (int t = 0; t < kThreads; ++t) {
    threads.emplace_back([&, t] {
      std::vector<std::string> ids;
      for (int i = 0; i < kJobs; ++i) {
        ids.push_back(Submit((7 * i + t) % 11 - 5));
        if (i % 4 == 3) {
          EXPECT_TRUE(Cancel(ids[static_cast<size_t>(i - 2)]).ok());
        }
      }
      for (const std::string& id : ids) {
        const JobState state = End(id);
        EXPECT_TRUE(state == v1::JOB_STATE_SUCCEEDED || state == v1::JOB_STATE_CANCELLED) << state;
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
  ExpectNothingHeld(size_t{kThreads} * kJobs);
}

INSTANTIATE_TEST_SUITE_P(Stores, RunnerTest,
                         ::testing::Values(StoreKind::kMemory, StoreKind::kKept,
                                           StoreKind::kSqlite),
                         [](const auto& about) { return NameOf(about.param); });

}  // namespace
}  // namespace certiq::server::testing
