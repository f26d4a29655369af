#include "job/quantize_job.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <map>
#include <memory>
#include <mutex>
#include <optional>
#include <utility>
#include <vector>

#include "base/status.h"
#include "support/gate.h"
#include "support/layers.h"

namespace certiq::server {
namespace {

using testing::Gate;
using testing::kPatience;
using testing::Layer;
using testing::MakeBlockingJob;
using testing::MakeRandomLayer;

// Remembers what a job told.
class Watcher : public Observer {
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

class QuantizeJobTest : public ::testing::Test {
 protected:
  ReadyLayer Take(const Layer& layer, const engine::ResolvedSpec& spec = {}) {
    LayerRequest request = testing::LayerRequestFor(layer);
    request.spec = spec;
    auto intake = LayerIntake::Create(request, budget_, pool_, cancelled_);
    EXPECT_TRUE(intake.ok());
    EXPECT_TRUE(
        (*intake)
            ->AppendWeights(0, testing::RowBytes(layer.weights, layer.features, 0, layer.rows))
            .ok());
    EXPECT_TRUE(
        (*intake)
            ->AppendActivations(0, testing::RowBytes(layer.x, layer.features, 0, layer.tokens))
            .ok());
    return *(*intake)->Finish();
  }

  std::shared_ptr<QuantizeJob> Make(ReadyLayer layer,
                                    std::function<void(engine::Phase, double)> progress = {}) {
    return std::make_shared<QuantizeJob>(
        pool_, watcher_, std::move(layer),
        QuantizeJob::Options{.progress = std::move(progress),
                             .done = [this](absl::StatusOr<QuantizeResult> result) {
                               result_ = std::move(result);
                               done_.Open();
                             }});
  }

  Watcher watcher_;
  Gate gate_;
  ByteBudget budget_{int64_t{4} << 30};
  WorkerPool pool_{2, 4};
  engine::Cancellation cancelled_;
  Gate done_;
  absl::StatusOr<QuantizeResult> result_ = absl::UnknownError("not done");
};

TEST_F(QuantizeJobTest, Succeeds) {
  Make(Take(MakeRandomLayer(16, 32, 100)))->Start(*pool_.Admit());
  ASSERT_TRUE(done_.Wait());
  ASSERT_TRUE(result_.ok()) << result_.status();
  EXPECT_EQ(result_->layer.certificate.rows, 16);
  EXPECT_GT(result_->reservation.bytes(), 0);
  EXPECT_EQ(budget_.reserved(), result_->reservation.bytes());
  result_->reservation.Release();
  ASSERT_TRUE(pool_.Drain(std::chrono::steady_clock::now() + kPatience));
  EXPECT_EQ(watcher_.outcomes, std::vector{JobState::kSucceeded});
  EXPECT_TRUE(watcher_.certified);
  EXPECT_TRUE(watcher_.settled());
  for (const auto phase : {engine::Phase::kQueue, engine::Phase::kFactor, engine::Phase::kRound,
                           engine::Phase::kCertify, engine::Phase::kPack}) {
    EXPECT_EQ(watcher_.phases[phase], 1);
  }
}

TEST_F(QuantizeJobTest, CancelledWhileQueued) {
  for (int i = 0; i < 2; ++i) {
    ASSERT_TRUE(pool_.Enqueue(*pool_.Admit(), MakeBlockingJob(pool_, gate_)).ok());
  }
  const auto job = Make(Take(MakeRandomLayer(16, 32, 100)));
  job->Start(*pool_.Admit());
  job->Cancel(absl::StatusCode::kCancelled);
  // Both workers are busy, so it ended here.
  EXPECT_TRUE(absl::IsCancelled(result_.status())) << result_.status();
  EXPECT_EQ(budget_.reserved(), 0);
  EXPECT_EQ(watcher_.outcomes, std::vector{JobState::kCancelled});
  EXPECT_TRUE(watcher_.settled());
  gate_.Open();
}

TEST_F(QuantizeJobTest, CancelledBeforeItStarts) {
  const auto job = Make(Take(MakeRandomLayer(64, 256, 300)));
  job->Cancel(absl::StatusCode::kDeadlineExceeded);
  job->Start(*pool_.Admit());
  ASSERT_TRUE(done_.Wait());
  EXPECT_TRUE(absl::IsDeadlineExceeded(result_.status())) << result_.status();
  EXPECT_EQ(watcher_.outcomes, std::vector{JobState::kExpired});
}

TEST_F(QuantizeJobTest, CancelledWhileItRuns) {
  Gate factoring;
  Gate cancelled;
  const auto job = Make(Take(MakeRandomLayer(64, 128, 64)), [&](engine::Phase phase, double) {
    if (phase != engine::Phase::kFactor) return;
    factoring.Open();
    // However fast the layer is.
    ASSERT_TRUE(cancelled.Wait());
  });
  job->Start(*pool_.Admit());
  ASSERT_TRUE(factoring.Wait());
  job->Cancel(absl::StatusCode::kCancelled);
  cancelled.Open();
  ASSERT_TRUE(done_.Wait());
  EXPECT_TRUE(absl::IsCancelled(result_.status())) << result_.status();
  EXPECT_EQ(budget_.reserved(), 0);
}

TEST_F(QuantizeJobTest, StartAfterShutdownIsUnavailable) {
  auto slot = pool_.Admit();
  const auto job = Make(Take(MakeRandomLayer(8, 16, 32)));
  pool_.Shutdown();
  job->Start(*std::move(slot));
  EXPECT_TRUE(absl::IsUnavailable(result_.status()));
  EXPECT_EQ(budget_.reserved(), 0);
  EXPECT_TRUE(watcher_.settled());
}

TEST_F(QuantizeJobTest, FailureToFactorIsToldAttemptByAttempt) {
  // One token and no damping: H has rank 1. The ladder from 0 starts too low to help in two steps.
  engine::ResolvedSpec spec;
  spec.damping_rule = engine::DampingRule::kAbsolute;
  spec.damping_value = 0;
  spec.max_attempts = 2;
  Make(Take(MakeRandomLayer(4, 64, 1), spec))->Start(*pool_.Admit());
  ASSERT_TRUE(done_.Wait());
  ASSERT_TRUE(absl::IsFailedPrecondition(result_.status())) << result_.status();
  ASSERT_TRUE(pool_.Drain(std::chrono::steady_clock::now() + kPatience));
  EXPECT_EQ(watcher_.failures, 2);
  EXPECT_EQ(watcher_.outcomes, std::vector{JobState::kFailed});
}

TEST_F(QuantizeJobTest, NoActivationsAreAPrecondition) {
  Layer layer = MakeRandomLayer(4, 16, 8);
  std::fill(layer.x.begin(), layer.x.end(), 0.0f);
  Make(Take(layer))->Start(*pool_.Admit());
  ASSERT_TRUE(done_.Wait());
  EXPECT_TRUE(absl::IsFailedPrecondition(result_.status()));
  EXPECT_TRUE(base::PreconditionOf(result_.status()).has_value());
  ASSERT_TRUE(pool_.Drain(std::chrono::steady_clock::now() + kPatience));
  EXPECT_EQ(watcher_.failures, 0);
}

}  // namespace
}  // namespace certiq::server
