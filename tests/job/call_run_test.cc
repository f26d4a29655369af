#include "job/call_run.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <map>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "base/status.h"
#include "job/admission.h"
#include "support/backend_examples.h"
#include "support/gate.h"
#include "support/layers.h"

namespace certiq::server::testing {
namespace {

using certiq::testing::Gate;
using certiq::testing::kPatience;
using certiq::testing::Layer;
using certiq::testing::LayerRequestFor;
using certiq::testing::MakeBlockingJob;
using certiq::testing::MakeRandomLayer;
using certiq::testing::RowBytes;
// A test has a private Run of its own.
using JobRun = server::Run;

// Remembers what a run told.
class RunWatcher : public Observer {
 public:
  void JobEntered(JobState state) override { Count(state, 1); }
  void JobLeft(JobState state) override { Count(state, -1); }
  void JobFinished(engine::Method /*method*/, JobState outcome, double /*seconds*/,
                   const engine::LayerCertificate* certificate) override {
    const std::lock_guard lock(mu_);
    outcomes.push_back(outcome);
    certified = certificate != nullptr;
  }
  void PhaseTook(engine::Method /*method*/, engine::Phase phase, double seconds) override {
    const std::lock_guard lock(mu_);
    EXPECT_GE(seconds, 0);
    ++phases[phase];
  }
  void StabilityFailed(engine::Method /*method*/, engine::StabilityCause /*cause*/) override {
    const std::lock_guard lock(mu_);
    ++failures;
  }

  // No job is counted in a state any more.
  bool settled() {
    const std::lock_guard lock(mu_);
    return std::all_of(states_.begin(), states_.end(), [](auto& s) { return s.second == 0; });
  }

  std::vector<JobState> outcomes;
  bool certified = false;
  std::map<engine::Phase, int> phases;
  int failures = 0;

 private:
  void Count(JobState state, int change) {
    const std::lock_guard lock(mu_);
    states_[state] += change;
  }
  std::mutex mu_;
  std::map<JobState, int> states_;
};

class CallRunTest : public ::testing::Test {
 protected:
  void SetUp() override {
    server_.options.observer = &watcher_;
    server_.options.queue_limit = 4;
    server_.Start();
  }
  void TearDown() override {
    gate_.Open();
    result_ = absl::UnknownError("gone with its server");
    server_.Stop();
  }

  // An upload that is finished.
  std::unique_ptr<Upload> Sent(const Layer& layer, JobRequest request) {
    auto upload = server_->jobs().Begin({}, std::move(request), cancellation_);
    EXPECT_TRUE(upload.ok()) << upload.status();
    if (!upload.ok()) return nullptr;
    EXPECT_TRUE(
        (*upload)->AppendWeights(0, RowBytes(layer.weights, layer.features, 0, layer.rows)).ok());
    if ((*upload)->request().activations.has_value()) {
      EXPECT_TRUE((*upload)
                      ->AppendActivations(0, RowBytes(layer.x, layer.features, 0, layer.tokens), {})
                      .ok());
    }
    EXPECT_TRUE((*upload)->Finish().ok());
    return *std::move(upload);
  }
  std::unique_ptr<Upload> Sent(const Layer& layer, const engine::ResolvedSpec& spec = {}) {
    JobRequest request = LayerRequestFor(layer);
    request.spec = spec;
    return Sent(layer, std::move(request));
  }
  // Starts the run; `started` hears of it before it is queued.
  void Start(std::unique_ptr<Upload> upload,
             std::function<void(engine::Phase, double)> progress = {},
             const std::function<void(const std::shared_ptr<JobRun>&)>& started = {}) {
    StartCallRun(server_->environment(), server_->calibrations(), *upload,
                 {.progress = progress ? std::move(progress) : [](engine::Phase, double) {},
                  .done =
                      [this](absl::StatusOr<CallResult> result) {
                        result_ = std::move(result);
                        done_.Open();
                      }},
                 [&](const std::shared_ptr<JobRun>& run) {
                   run_ = run;
                   if (started) started(run);
                 });
  }
  void BlockWorkers() {
    for (int i = 0; i < 2; ++i) {
      ASSERT_TRUE(server_->pool()
                      .Enqueue(*server_->pool().Admit(), MakeBlockingJob(server_->pool(), gate_))
                      .ok());
    }
  }
  void ExpectNothingHeld() {
    Settle(*server_);
    EXPECT_EQ(server_->memory().reserved(), 0);
    EXPECT_TRUE(watcher_.settled());
    EXPECT_TRUE(server_->pool().Drain(std::chrono::steady_clock::now() + kPatience));
    EXPECT_TRUE(server_->environment().quotas.Of(Tenant{"", {.jobs = 1}}).jobs.Take("jobs").ok());
  }

  RunWatcher watcher_;
  engine::Cancellation cancellation_;
  Gate gate_;
  Gate done_;
  Server server_{StoreKind::kMemory};
  absl::StatusOr<CallResult> result_ = absl::UnknownError("not done");
  std::shared_ptr<JobRun> run_;
};

TEST_F(CallRunTest, Succeeds) {
  const Layer layer = MakeRandomLayer(16, 32, 100);
  Start(Sent(layer));
  ASSERT_TRUE(done_.Wait());
  ASSERT_TRUE(result_.ok()) << result_.status();
  Settle(*server_);
  EXPECT_GT(result_->memory.bytes(), 0);
  EXPECT_EQ(server_->memory().reserved(), result_->memory.bytes());
  const ResultRecord& record = result_->reader->record();
  const auto all = ReadAll(*result_->reader);
  ASSERT_TRUE(all.ok()) << all.status();
  EXPECT_EQ(static_cast<int64_t>(all->tensors.size()), record.tensor_bytes());
  EXPECT_LE(record.tensor_bytes(), result_->memory.bytes());
  EXPECT_EQ(all->certificate.relative_error(), record.relative_error());
  EXPECT_EQ(all->certificate.weights_sha256().size(), 64U);
  EXPECT_EQ(all->certificate.x_sha256().size(), 64U);
  EXPECT_EQ(all->certificate.calibration_id(), "");
  result_ = absl::UnknownError("read");
  EXPECT_EQ(watcher_.outcomes, std::vector{v1::JOB_STATE_SUCCEEDED});
  EXPECT_TRUE(watcher_.certified);
  for (const auto phase : {engine::Phase::kQueue, engine::Phase::kFactor, engine::Phase::kRound,
                           engine::Phase::kCertify, engine::Phase::kPack}) {
    EXPECT_EQ(watcher_.phases[phase], 1);
  }
  ExpectNothingHeld();
}

// The result of a stored job, of the same layer and calibration, byte for byte.
TEST_F(CallRunTest, UsesACalibrationAsStoredJobsDo) {
  const Layer layer = MakeRandomLayer(6, 32, 200);
  const std::string calibration_id =
      Calibrate(server_, layer, {.held_out_fraction = 0.25, .sequence_rows = 10});
  const auto stored =
      Submit(*server_, layer, JobRequestFor(layer, calibration_id, "", v1::METHOD_OPTQ));
  ASSERT_TRUE(stored.ok()) << stored.status();
  ASSERT_EQ(WaitForEnd(*server_, stored->record.id()), v1::JOB_STATE_SUCCEEDED);
  JobResult expected = ResultOf(*server_, stored->record.id()).value();

  JobRequest request = JobRequestFor(layer, calibration_id, "", v1::METHOD_OPTQ);
  request.stored = false;
  const CalibrationCalls calibration(server_, calibration_id);
  auto upload = Sent(layer, std::move(request));
  EXPECT_EQ(calibration.View().jobs, 1);
  Start(std::move(upload));
  ASSERT_TRUE(done_.Wait());
  ASSERT_TRUE(result_.ok()) << result_.status();
  JobResult all = ReadAll(*result_->reader).value();
  EXPECT_EQ(all.tensors, expected.tensors);
  for (v1::Certificate* certificate : {&all.certificate, &expected.certificate}) {
    certificate->clear_phase_seconds();
  }
  EXPECT_TRUE(Same(all.certificate, expected.certificate));
  // It holds the calibration no longer than it runs.
  EXPECT_EQ(calibration.View().jobs, 0);
  EXPECT_TRUE(calibration.Remove().ok());
}

TEST_F(CallRunTest, CancelledWhileQueued) {
  BlockWorkers();
  Start(Sent(MakeRandomLayer(16, 32, 100)));
  run_->Cancel(absl::StatusCode::kCancelled);
  // Both workers are busy, so it ended here.
  EXPECT_TRUE(absl::IsCancelled(result_.status())) << result_.status();
  EXPECT_EQ(server_->memory().reserved(), 0);
  EXPECT_EQ(watcher_.outcomes, std::vector{v1::JOB_STATE_CANCELLED});
  EXPECT_TRUE(watcher_.settled());
  gate_.Open();
  ExpectNothingHeld();
}

TEST_F(CallRunTest, CancelledBeforeItIsQueued) {
  Start(Sent(MakeRandomLayer(64, 256, 300)), {}, [](const std::shared_ptr<JobRun>& run) {
    run->Cancel(absl::StatusCode::kDeadlineExceeded);
  });
  ASSERT_TRUE(done_.Wait());
  EXPECT_TRUE(absl::IsDeadlineExceeded(result_.status())) << result_.status();
  Settle(*server_);
  EXPECT_EQ(watcher_.outcomes, std::vector{v1::JOB_STATE_EXPIRED});
  ExpectNothingHeld();
}

TEST_F(CallRunTest, CancelledWhileItRuns) {
  Gate factoring;
  Gate cancelled;
  Start(Sent(MakeRandomLayer(64, 128, 64)), [&](engine::Phase phase, double) {
    if (phase != engine::Phase::kFactor) return;
    factoring.Open();
    // However fast the layer is.
    ASSERT_TRUE(cancelled.Wait());
  });
  ASSERT_TRUE(factoring.Wait());
  run_->Cancel(absl::StatusCode::kCancelled);
  cancelled.Open();
  ASSERT_TRUE(done_.Wait());
  EXPECT_TRUE(absl::IsCancelled(result_.status())) << result_.status();
  ExpectNothingHeld();
}

TEST_F(CallRunTest, StartAfterShutdownIsUnavailable) {
  auto upload = Sent(MakeRandomLayer(8, 16, 32));
  server_->Hurry();
  Start(std::move(upload));
  EXPECT_TRUE(absl::IsUnavailable(result_.status()));
  EXPECT_EQ(server_->memory().reserved(), 0);
  EXPECT_TRUE(watcher_.settled());
}

TEST_F(CallRunTest, FailureToFactorIsToldAttemptByAttempt) {
  // Two tokens and no damping: H has rank 2.
  engine::ResolvedSpec spec;
  spec.damping_rule = engine::DampingRule::kAbsolute;
  spec.damping_value = 0;
  spec.max_attempts = 1;
  Start(Sent(MakeRandomLayer(4, 64, 2), spec));
  ASSERT_TRUE(done_.Wait());
  ASSERT_TRUE(absl::IsFailedPrecondition(result_.status())) << result_.status();
  ExpectNothingHeld();
  EXPECT_EQ(watcher_.failures, 1);
  EXPECT_EQ(watcher_.outcomes, std::vector{v1::JOB_STATE_FAILED});
}

TEST_F(CallRunTest, NoActivationsAreAPrecondition) {
  Layer layer = MakeRandomLayer(4, 16, 8);
  std::fill(layer.x.begin(), layer.x.end(), 0.0f);
  Start(Sent(layer));
  ASSERT_TRUE(done_.Wait());
  EXPECT_TRUE(absl::IsFailedPrecondition(result_.status()));
  EXPECT_TRUE(base::PreconditionOf(result_.status()).has_value());
  ExpectNothingHeld();
  EXPECT_EQ(watcher_.failures, 0);
}

}  // namespace
}  // namespace certiq::server::testing
