#include "job/job_desk.h"

#include <gtest/gtest.h>

#include <atomic>
#include <limits>
#include <memory>
#include <mutex>
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

class JobDeskTest : public ::testing::TestWithParam<StoreKind> {
 protected:
  void SetUp() override {
    server_.options.workers = 1;
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
  CalibrationCalls calibration() { return CalibrationCalls(server_, calibration_id_); }
  JobRequest Request(const std::string& request_id = "", v1::Method method = v1::METHOD_NEAREST) {
    return JobRequestFor(layer_, calibration_id_, request_id, method);
  }
  absl::StatusOr<std::unique_ptr<Upload>> Begin(const JobRequest& request,
                                                const Tenant& tenant = {}) {
    return desk().Begin(tenant, request, cancellation_);
  }
  std::string MustSubmit(const JobRequest& request) {
    auto job = Submit(*server_, layer_, request);
    EXPECT_TRUE(job.ok()) << job.status();
    return job.ok() ? job->record.id() : "";
  }
  JobView View(const std::string& id) { return ViewOf(*server_, id); }
  // Keeps the only worker until gate_ opens; tasks run meanwhile.
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

  const Layer layer_ = MakeRandomLayer(6, 32, 200);
  engine::Cancellation cancellation_;
  Gate gate_;
  Server server_{GetParam()};
  std::string calibration_id_;
};

TEST_P(JobDeskTest, RunsAndKeepsTheResult) {
  for (const v1::Method method : {v1::METHOD_NEAREST, v1::METHOD_OPTQ, v1::METHOD_QRONOS}) {
    const std::string id = MustSubmit(Request("", method));
    ASSERT_EQ(WaitForEnd(*server_, id), v1::JOB_STATE_SUCCEEDED) << View(id).record.DebugString();
    const JobRecord record = View(id).record;
    EXPECT_EQ(record.starts(), 1);
    EXPECT_GE(record.start_time(), record.create_time());
    EXPECT_GE(record.end_time(), record.start_time());
    EXPECT_FALSE(record.has_weights());
    EXPECT_EQ(record.layer_name(), "model.layers.0.test");
    EXPECT_EQ(record.spec().method(), method);
    EXPECT_EQ(record.result().header().tensors(0).name(), "weight");
    const auto result = ResultOf(*server_, id);
    ASSERT_TRUE(result.ok()) << result.status();
    EXPECT_EQ(static_cast<int64_t>(result->tensors.size()), record.result().tensor_bytes());
    EXPECT_GE(result->tensors.size(), size_t{6} * 32 * 4);
    EXPECT_EQ(result->certificate.weights_sha256(), record.weights_sha256());
    EXPECT_EQ(result->certificate.sums_sha256(), calibration().View().record.sums_sha256());
    EXPECT_EQ(result->certificate.calibration_id(), calibration_id_);
    EXPECT_EQ(result->certificate.relative_error(), record.result().relative_error());
  }
  const auto count = [&](const Tenant& tenant, std::vector<JobState> states) {
    std::string next;
    return desk().List(tenant, std::move(states), "", {.size = 2, .after = {}}, next)->size();
  };
  EXPECT_EQ(count({}, {v1::JOB_STATE_SUCCEEDED}), 2U);
  EXPECT_EQ(count({}, {v1::JOB_STATE_FAILED}), 0U);
  EXPECT_EQ(count({"other", {}}, {}), 0U);
}

TEST_P(JobDeskTest, ResultsAreReadFromAnyOffset) {
  const std::string id = MustSubmit(Request());
  EXPECT_EQ(WaitForEnd(*server_, id), v1::JOB_STATE_SUCCEEDED);
  const JobResult whole = ResultOf(*server_, id).value();
  for (const size_t offset : {size_t{1}, size_t{500}, whole.tensors.size()}) {
    const auto reader = desk().OpenResult({}, id, static_cast<int64_t>(offset));
    ASSERT_TRUE(reader.ok()) << reader.status();
    const auto rest = ReadAll(**reader);
    ASSERT_TRUE(rest.ok()) << rest.status();
    EXPECT_EQ(rest->tensors, whole.tensors.substr(offset));
    EXPECT_TRUE(Same(rest->certificate, whole.certificate));
  }
  for (const int64_t offset : {int64_t{-1}, static_cast<int64_t>(whole.tensors.size()) + 1}) {
    EXPECT_TRUE(absl::IsInvalidArgument(desk().OpenResult({}, id, offset).status()));
  }
  EXPECT_TRUE(absl::IsNotFound(desk().OpenResult({"other", {}}, id, 0).status()));
  Block();
  EXPECT_TRUE(absl::IsFailedPrecondition(desk().OpenResult({}, MustSubmit(Request()), 0).status()));
}

TEST_P(JobDeskTest, OneRequestMakesOneJob) {
  const std::string id = MustSubmit(Request("r"));
  EXPECT_EQ(MustSubmit(Request("r")), id);
  EXPECT_TRUE(absl::IsAlreadyExists(Begin(Request("r", v1::METHOD_OPTQ)).status()));
  Layer other = layer_;
  other.weights[0] += 1;
  EXPECT_TRUE(absl::IsAlreadyExists(Submit(*server_, other, Request("r")).status()));
  EXPECT_NE(MustSubmit(Request()), MustSubmit(Request()));

  std::vector<std::string> made(4);
  std::vector<std::thread> threads;
  threads.reserve(made.size());
  for (std::string& one : made) {
    threads.emplace_back([&] { one = MustSubmit(Request("many")); });
  }
  for (std::thread& thread : threads) thread.join();
  for (const std::string& one : made) EXPECT_EQ(one, made[0]);
}

// Both uploads began before there was a job; who ends last finds the job of who ended first.
TEST_P(JobDeskTest, UploadsOfOneRequestSideBySideMakeOneJob) {
  Block();
  Layer other = layer_;
  other.weights[0] += 1;
  const auto first = Begin(Request("r"));
  const auto same = Begin(Request("r"));
  const auto different = Begin(Request("r"));
  const auto send = [&](Upload& upload, const Layer& layer) -> absl::StatusOr<JobView> {
    EXPECT_TRUE(
        upload.AppendWeights(0, RowBytes(layer.weights, layer.features, 0, layer.rows)).ok());
    EXPECT_TRUE(upload.Finish().ok());
    return desk().Add({}, upload);
  };
  const auto made = send(**first, layer_);
  ASSERT_TRUE(made.ok()) << made.status();
  const int64_t held = server_->memory().reserved();
  EXPECT_EQ(send(**same, layer_)->record.id(), made->record.id());
  EXPECT_TRUE(absl::IsAlreadyExists(send(**different, other).status()));
  EXPECT_LE(server_->memory().reserved(), held);
  // Nothing is left of the two: neither jobs nor places in the queue.
  EXPECT_EQ(calibration().View().jobs, 1 + 2);
  EXPECT_EQ(server_->pool().queue_depth(), 1);
}

TEST_P(JobDeskTest, UploadsAreChecked) {
  Layer broken = layer_;
  broken.weights[40] = std::numeric_limits<float>::infinity();
  const absl::Status infinite = Submit(*server_, broken, Request()).status();
  EXPECT_TRUE(absl::IsInvalidArgument(infinite)) << infinite;
  EXPECT_CONTAINS(infinite.message(), "row 1, column 8");
  auto upload = Begin(Request());
  ASSERT_TRUE(upload.ok());
  EXPECT_FALSE((*upload)->AppendWeights(1, RowBytes(layer_.weights, layer_.features, 0, 1)).ok());
  EXPECT_TRUE((*upload)->AppendWeights(0, RowBytes(layer_.weights, layer_.features, 0, 1)).ok());
  EXPECT_CONTAINS((*upload)->Finish().message(), "expected 6 rows, got 1");
  EXPECT_EQ(calibration().View().jobs, 1);
  EXPECT_TRUE(absl::IsFailedPrecondition(calibration().Remove()));
  upload->reset();
  EXPECT_TRUE(calibration().Remove().ok());
}

// The job itself keeps the calibration, not the call that made it.
TEST_P(JobDeskTest, TheUploadLetsGoOfTheCalibration) {
  Block();
  const auto upload = Begin(Request());
  ASSERT_TRUE(upload.ok());
  ASSERT_TRUE(
      (*upload)->AppendWeights(0, RowBytes(layer_.weights, layer_.features, 0, layer_.rows)).ok());
  ASSERT_TRUE((*upload)->Finish().ok());
  ASSERT_TRUE(desk().Add({}, **upload).ok());
  EXPECT_EQ(calibration().View().jobs, 1);
}

TEST_P(JobDeskTest, CancelsWhatWaits) {
  Block();
  const std::string id = MustSubmit(Request());
  // One that is just being claimed ends a moment later: here the claim is over.
  RunTasks(*server_);
  EXPECT_EQ(View(id).queue_position, 0);
  EXPECT_EQ(server_->pool().queue_depth(), 1);
  EXPECT_TRUE(absl::IsFailedPrecondition(desk().Remove({}, id)));
  EXPECT_TRUE(absl::IsFailedPrecondition(calibration().Remove()));
  EXPECT_TRUE(
      absl::IsNotFound(desk().Cancel({"other", {}}, id, absl::StatusCode::kCancelled).status()));
  const auto view = desk().Cancel({}, id, absl::StatusCode::kCancelled);
  ASSERT_TRUE(view.ok()) << view.status();
  EXPECT_EQ(view->record.state(), v1::JOB_STATE_CANCELLED);
  EXPECT_EQ(view->queue_position, -1);
  EXPECT_EQ(view->record.starts(), 0);
  EXPECT_FALSE(view->record.has_weights());
  EXPECT_EQ(view->record.error().code(), static_cast<int>(absl::StatusCode::kCancelled));
  EXPECT_EQ(server_->pool().queue_depth(), 0);
  // Again: it stays as it is.
  EXPECT_TRUE(
      Same(desk().Cancel({}, id, absl::StatusCode::kDeadlineExceeded)->record, view->record));
  EXPECT_TRUE(calibration().Remove().ok());
  EXPECT_TRUE(desk().Remove({}, id).ok());
  EXPECT_TRUE(absl::IsNotFound(desk().Get({}, id).status()));
  EXPECT_TRUE(absl::IsNotFound(desk().Cancel({}, id, absl::StatusCode::kCancelled).status()));
}

TEST_P(JobDeskTest, CancelsWhatRuns) {
  Gate starting;
  server_.plan.before = [&](StoreWrite write) {
    if (write != StoreWrite::kStartJob) return;
    starting.Open();
    EXPECT_TRUE(gate_.Wait());
  };
  const std::string id = MustSubmit(Request());
  ASSERT_TRUE(starting.Wait());
  const auto view = desk().Cancel({}, id, absl::StatusCode::kCancelled);
  ASSERT_TRUE(view.ok()) << view.status();
  EXPECT_EQ(view->record.state(), v1::JOB_STATE_QUEUED);
  gate_.Open();
  EXPECT_EQ(WaitForEnd(*server_, id), v1::JOB_STATE_CANCELLED);
  Settle(*server_);
  EXPECT_EQ(calibration().View().jobs, 0);
}

TEST_P(JobDeskTest, DeadlinesAndTimesToLive) {
  Block();
  JobRequest request = Request("r");
  request.deadline_micros = 1;
  request.ttl_micros = 0;
  const std::string late = MustSubmit(request);
  const std::string other = MustSubmit(Request());
  JobView view = View(late);
  while (!IsFinal(view.record.state())) {
    // One tick ends it, another may delete it.
    server_->jobs().Tick();
    const auto found = desk().Get({}, late);
    if (!found.ok()) break;
    view = *found;
  }
  if (IsFinal(view.record.state())) {
    EXPECT_EQ(view.record.state(), v1::JOB_STATE_EXPIRED);
  }
  EXPECT_EQ(View(other).record.state(), v1::JOB_STATE_QUEUED);
  desk().Tick();
  EXPECT_TRUE(absl::IsNotFound(desk().Get({}, late).status()));
  EXPECT_EQ(View(other).record.state(), v1::JOB_STATE_QUEUED);
  gate_.Open();
  EXPECT_EQ(WaitForEnd(*server_, other), v1::JOB_STATE_SUCCEEDED);
  // Its name is free again.
  EXPECT_NE(MustSubmit(Request("r")), late);
}

TEST_P(JobDeskTest, ADeadlineEndsWhatWaits) {
  Block();
  JobRequest request = Request();
  request.deadline_micros = 1;
  const std::string late = MustSubmit(request);
  while (!IsFinal(View(late).record.state())) desk().Tick();
  EXPECT_EQ(View(late).record.state(), v1::JOB_STATE_EXPIRED);
  EXPECT_EQ(View(late).record.error().code(),
            static_cast<int>(absl::StatusCode::kDeadlineExceeded));
}

TEST_P(JobDeskTest, HigherPriorityGoesFirst) {
  std::mutex mu;
  std::vector<int> order;
  server_.plan.after = [&](StoreWrite write, const JobRecord& record) {
    const std::lock_guard lock(mu);
    if (write == StoreWrite::kStartJob) order.push_back(record.priority());
  };
  Block();
  std::vector<std::string> jobs;
  for (const int priority : {0, -100, 100, 7}) {
    JobRequest request = Request();
    request.priority = priority;
    jobs.push_back(MustSubmit(request));
  }
  EXPECT_EQ(View(jobs[1]).queue_position, 3);
  EXPECT_EQ(View(jobs[2]).queue_position, 0);
  gate_.Open();
  for (const std::string& id : jobs) EXPECT_EQ(WaitForEnd(*server_, id), v1::JOB_STATE_SUCCEEDED);
  EXPECT_EQ(order, (std::vector<int>{100, 7, 0, -100}));
}

TEST_P(JobDeskTest, WaitsForItsMemory) {
  Block();
  const std::string id = MustSubmit(Request());
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
  Settle(*server_);
  EXPECT_EQ(View(id).record.state(), v1::JOB_STATE_QUEUED);
  EXPECT_EQ(View(id).queue_position, 0);
  others->Release();
  EXPECT_EQ(WaitForEnd(*server_, id), v1::JOB_STATE_SUCCEEDED);
}

TEST_P(JobDeskTest, AStateIsSeenOnceItIsWritten) {
  Gate running;
  Gate ending;
  Gate end;
  server_.plan.before = [&](StoreWrite write) {
    if (write == StoreWrite::kStartJob) {
      running.Open();
      EXPECT_TRUE(gate_.Wait());
    } else if (write == StoreWrite::kFinishJob) {
      ending.Open();
      EXPECT_TRUE(end.Wait());
    }
  };
  const std::string id = MustSubmit(Request());
  ASSERT_TRUE(running.Wait());
  EXPECT_EQ(View(id).record.state(), v1::JOB_STATE_QUEUED);
  gate_.Open();
  ASSERT_TRUE(ending.Wait());
  EXPECT_EQ(View(id).record.state(), v1::JOB_STATE_RUNNING);
  EXPECT_GE(View(id).progress.fraction, 0);
  end.Open();
  EXPECT_EQ(WaitForEnd(*server_, id), v1::JOB_STATE_SUCCEEDED);
}

INSTANTIATE_TEST_SUITE_P(Stores, JobDeskTest,
                         ::testing::Values(StoreKind::kMemory, StoreKind::kKept,
                                           StoreKind::kSqlite),
                         [](const auto& about) { return NameOf(about.param); });

}  // namespace
}  // namespace certiq::server::testing
