#include "job/job_manager.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <atomic>
#include <memory>
#include <mutex>
#include <optional>
#include <set>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "support/backend_examples.h"
#include "support/gate.h"
#include "support/text.h"

namespace certiq::server::testing {
namespace {

using certiq::testing::Gate;
using certiq::testing::Layer;
using certiq::testing::MakeBlockingJob;
using certiq::testing::MakeRandomLayer;
using certiq::testing::RowBytes;

class JobManagerTest : public ::testing::TestWithParam<StoreKind> {
 protected:
  void SetUp() override {
    server_.options.workers = 1;
    server_.Start();
    ASSERT_FALSE(HasFatalFailure());
    calibration_ = Calibrate(backend(), layer_);
    ASSERT_NE(calibration_, nullptr);
  }
  void TearDown() override {
    gate_.Open();
    // It goes before what it pays to.
    calibration_ = nullptr;
    server_.Stop();
  }

  Backend& backend() { return *server_.operator->(); }
  JobRequest Request(const std::string& request_id = "", const std::string& spec = "nearest") {
    return JobRequestFor(layer_, *calibration_, request_id, spec);
  }
  std::shared_ptr<StoredJob> MustSubmit(const JobRequest& request) {
    auto job = Submit(backend(), layer_, request);
    EXPECT_TRUE(job.ok()) << job.status();
    return job.value_or(nullptr);
  }
  // Keeps the only worker until gate_ opens.
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
  absl::Status RemoveCalibration() {
    return InStrand(*calibration_, [&] { return server_->calibrations().Remove(calibration_); });
  }

  const Layer layer_ = MakeRandomLayer(6, 32, 200);
  Gate gate_;
  Server server_{GetParam()};
  std::shared_ptr<Calibration> calibration_;
};

TEST_P(JobManagerTest, RunsAndKeepsTheResult) {
  for (const std::string spec : {"nearest", "optq", "qronos"}) {
    const auto job = MustSubmit(Request("", spec));
    ASSERT_EQ(WaitForEnd(*job), JobState::kSucceeded) << job->View().record.error;
    const JobRecord record = job->View().record;
    EXPECT_EQ(record.starts, 1);
    EXPECT_GE(record.end_time, record.start_time);
    EXPECT_TRUE(record.weights.empty());
    EXPECT_CONTAINS(record.result_header, "weight:768");
    const auto bytes = ResultOf(backend(), *job);
    ASSERT_TRUE(bytes.ok()) << bytes.status();
    std::string text(bytes->size(), ' ');
    std::transform(bytes->begin(), bytes->end(), text.begin(),
                   [](std::byte b) { return static_cast<char>(b); });
    EXPECT_CONTAINS(text.substr(static_cast<size_t>(record.result_tensor_bytes)),
                    record.weights_sha256 + " " + calibration_->View(false).record.sums_sha256);
  }
  EXPECT_EQ(server_->manager().List({}, {JobState::kSucceeded}, "", 2, "")->items.size(), 2U);
  EXPECT_TRUE(server_->manager().List({}, {JobState::kFailed}, "", 2, "")->items.empty());
  EXPECT_TRUE(server_->manager().List({"other", {}}, {}, "", 2, "")->items.empty());
}

TEST_P(JobManagerTest, OneRequestMakesOneJob) {
  const auto job = MustSubmit(Request("r"));
  EXPECT_EQ(MustSubmit(Request("r")), job);
  EXPECT_TRUE(absl::IsAlreadyExists(server_->manager().Begin({}, Request("r", "optq")).status()));
  Layer other = layer_;
  other.weights[0] += 1;
  EXPECT_TRUE(absl::IsAlreadyExists(Submit(backend(), other, Request("r")).status()));
  EXPECT_NE(MustSubmit(Request()), MustSubmit(Request()));

  auto open = server_->manager().Begin({}, Request("open"));
  ASSERT_TRUE(open.ok());
  EXPECT_TRUE(absl::IsUnavailable(server_->manager().Begin({}, Request("open")).status()));
  open->reset();
  EXPECT_TRUE(server_->manager().Begin({}, Request("open")).ok());

  std::vector<std::shared_ptr<StoredJob>> made(4);
  std::vector<std::thread> threads;
  threads.reserve(made.size());
  for (auto& slot : made) {
    threads.emplace_back([&] {
      for (;;) {
        auto submitted = Submit(backend(), layer_, Request("many"));
        if (absl::IsUnavailable(submitted.status())) continue;
        ASSERT_TRUE(submitted.ok()) << submitted.status();
        slot = *submitted;
        return;
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
  for (const auto& one : made) EXPECT_EQ(one, made[0]);
}

TEST_P(JobManagerTest, UploadsAreChecked) {
  Layer broken = layer_;
  broken.weights[40] = std::numeric_limits<float>::infinity();
  const absl::Status infinite = Submit(backend(), broken, Request()).status();
  EXPECT_TRUE(absl::IsInvalidArgument(infinite)) << infinite;
  auto upload = server_->manager().Begin({}, Request());
  ASSERT_TRUE(upload.ok());
  EXPECT_FALSE((*upload)->Append(1, RowBytes(layer_.weights, layer_.features, 0, 1)).ok());
  EXPECT_TRUE((*upload)->Append(0, RowBytes(layer_.weights, layer_.features, 0, 1)).ok());
  EXPECT_CONTAINS((*upload)->Finish().status().message(), "expected 6 rows, got 1");
  JobRequest request = Request();
  request.priority = 101;
  EXPECT_TRUE(absl::IsInvalidArgument(server_->manager().Begin({}, request).status()));
  request = Request();
  request.features = 31;
  EXPECT_TRUE(absl::IsInvalidArgument(server_->manager().Begin({}, request).status()));
  request = Request();
  request.spec.min_tokens = 201;
  EXPECT_TRUE(absl::IsFailedPrecondition(server_->manager().Begin({}, request).status()));
  EXPECT_TRUE(absl::IsNotFound(server_->manager().Begin({"other", {}}, Request()).status()));
  EXPECT_TRUE(
      absl::IsResourceExhausted(server_->manager().Begin({"", {.jobs = 0}}, Request()).status()));
  upload->reset();
  EXPECT_TRUE(RemoveCalibration().ok());
}

TEST_P(JobManagerTest, CancelsWhatWaits) {
  Block();
  const auto job = MustSubmit(Request());
  EXPECT_EQ(job->View().queue_position, 0);
  EXPECT_TRUE(absl::IsFailedPrecondition(server_->manager().Remove({}, job->id())));
  EXPECT_TRUE(absl::IsFailedPrecondition(RemoveCalibration()));
  job->Cancel(absl::StatusCode::kCancelled);
  const JobView view = job->View();
  EXPECT_EQ(view.record.state, JobState::kCancelled);
  EXPECT_EQ(view.queue_position, -1);
  EXPECT_EQ(view.record.starts, 0);
  EXPECT_CONTAINS(view.record.error, "CANCELLED");
  EXPECT_TRUE(RemoveCalibration().ok());
  EXPECT_TRUE(server_->manager().Remove({}, job->id()).ok());
  EXPECT_TRUE(absl::IsNotFound(server_->manager().Find({}, job->id()).status()));
}

TEST_P(JobManagerTest, CancelsWhatRuns) {
  Gate starting;
  server_.plan.before_put = [&](const JobRecord& record) {
    if (record.state != JobState::kRunning) return;
    starting.Open();
    EXPECT_TRUE(gate_.Wait());
  };
  const auto job = MustSubmit(Request());
  ASSERT_TRUE(starting.Wait());
  job->Cancel(absl::StatusCode::kCancelled);
  EXPECT_FALSE(job->ended());
  gate_.Open();
  EXPECT_EQ(WaitForEnd(*job), JobState::kCancelled);
  Settle(backend());
  EXPECT_EQ(calibration_->View(false).jobs, 0);
}

TEST_P(JobManagerTest, DeadlinesAndTimesToLive) {
  Block();
  JobRequest request = Request("r");
  request.deadline_micros = 1;
  request.ttl_micros = 0;
  const auto late = MustSubmit(request);
  const auto other = MustSubmit(Request());
  while (!late->ended()) server_->manager().Tick();
  EXPECT_EQ(late->View().record.state, JobState::kExpired);
  EXPECT_FALSE(other->ended());
  server_->manager().Tick();
  EXPECT_TRUE(absl::IsNotFound(server_->manager().Find({}, late->id()).status()));
  EXPECT_TRUE(server_->manager().Find({}, other->id()).ok());
  gate_.Open();
  EXPECT_EQ(WaitForEnd(*other), JobState::kSucceeded);
  // Its name is free again.
  EXPECT_NE(MustSubmit(Request("r")), late);
}

TEST_P(JobManagerTest, HigherPriorityGoesFirst) {
  std::mutex mu;
  std::vector<int> order;
  server_.plan.before_put = [&](const JobRecord& record) {
    const std::lock_guard lock(mu);
    if (record.state == JobState::kRunning) order.push_back(record.priority);
  };
  Block();
  std::vector<std::shared_ptr<StoredJob>> jobs;
  for (const int priority : {0, -100, 100, 7}) {
    JobRequest request = Request();
    request.priority = priority;
    jobs.push_back(MustSubmit(request));
  }
  EXPECT_EQ(jobs[1]->View().queue_position, 3);
  EXPECT_EQ(jobs[2]->View().queue_position, 0);
  gate_.Open();
  for (const auto& job : jobs) EXPECT_EQ(WaitForEnd(*job), JobState::kSucceeded);
  EXPECT_EQ(order, (std::vector<int>{100, 7, 0, -100}));
}

TEST_P(JobManagerTest, WaitsForItsMemory) {
  Block();
  const auto job = MustSubmit(Request());
  ByteBudget& memory = server_->memory();
  auto others = memory.TryReserve(memory.capacity() - memory.reserved(), "others");
  ASSERT_TRUE(others.ok());
  gate_.Open();
  // One behind it, which needs nothing, passes.
  Gate passed;
  auto slot = server_->pool().Admit();
  ASSERT_TRUE(slot.ok());
  ASSERT_TRUE(
      server_->pool()
          .Enqueue(*std::move(slot), {.cancellation = std::make_shared<engine::Cancellation>(),
                                      .run = [] { return absl::OkStatus(); },
                                      .done = [&](const absl::Status&) { passed.Open(); }})
          .ok());
  ASSERT_TRUE(passed.Wait());
  Settle(backend());
  EXPECT_EQ(job->View().record.state, JobState::kQueued);
  EXPECT_EQ(job->View().queue_position, 0);
  others->Release();
  EXPECT_EQ(WaitForEnd(*job), JobState::kSucceeded);
}

TEST_P(JobManagerTest, AStateIsSeenOnceItIsWritten) {
  Gate running;
  Gate ending;
  Gate end;
  server_.plan.before_put = [&](const JobRecord& record) {
    if (record.state == JobState::kRunning) {
      running.Open();
      EXPECT_TRUE(gate_.Wait());
    } else if (IsFinal(record.state)) {
      ending.Open();
      EXPECT_TRUE(end.Wait());
    }
  };
  const auto job = MustSubmit(Request());
  ASSERT_TRUE(running.Wait());
  EXPECT_EQ(job->View().record.state, JobState::kQueued);
  gate_.Open();
  ASSERT_TRUE(ending.Wait());
  EXPECT_EQ(job->View().record.state, JobState::kRunning);
  EXPECT_EQ(server_->manager().running(), 1);
  end.Open();
  EXPECT_EQ(WaitForEnd(*job), JobState::kSucceeded);
}

INSTANTIATE_TEST_SUITE_P(Stores, JobManagerTest,
                         ::testing::Values(StoreKind::kMemory, StoreKind::kKept,
                                           StoreKind::kSqlite),
                         [](const auto& about) { return NameOf(about.param); });

}  // namespace
}  // namespace certiq::server::testing
