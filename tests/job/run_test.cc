#include "job/run.h"

#include <gtest/gtest.h>

#include <atomic>
#include <memory>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "engine/gram/gram.h"
#include "engine/kernels/strip_matrix.h"
#include "support/gate.h"
#include "support/layers.h"

namespace certiq::server {
namespace {

using testing::Gate;
using testing::kPatience;
using testing::Layer;
using testing::MakeBlockingJob;
using testing::MakeRandomLayer;
// A test has a private Run of its own.
using JobRun = server::Run;

class RunTest : public ::testing::Test {
 protected:
  ~RunTest() override { gate_.Open(); }

  RunInput InputFor(const Layer& layer) {
    RunInput input;
    engine::StripMatrix weights(layer.rows, layer.features);
    for (int64_t row = 0; row < layer.rows; ++row) {
      weights.SetRow(row, layer.weights.data() + row * layer.features);
    }
    engine::StatisticsAccumulator sums(layer.features);
    const auto bytes = testing::RowBytes(layer.x, layer.features, 0, layer.tokens);
    EXPECT_TRUE(sums.Append({engine::DType::kF32, bytes.data(), "x"}, 0, layer.tokens, pool_).ok());
    input.problem.weights = std::move(weights);
    input.problem.statistics =
        std::make_shared<const engine::Statistics>(std::move(sums).Finish(pool_));
    input.facts.calibration_id = "calibration";
    return input;
  }
  // What each step holds, to see that all of it goes.
  JobRun::Steps Steps() {
    const auto held = std::make_shared<int>(0);
    held_ = held;
    return {.priority = 0,
            .ready = nullptr,
            .load = [this, held]() -> absl::StatusOr<RunInput> {
              ++loads_;
              return InputFor(layer_);
            },
            .keep =
                [this, held](const engine::QuantizedLayer& layer, const CertificateFacts& facts) {
                  EXPECT_EQ(layer.certificate.rows, layer_.rows);
                  EXPECT_EQ(facts.calibration_id, "calibration");
                  ++kept_;
                  return absl::OkStatus();
                },
            .progress = [held](engine::Phase /*phase*/, double /*fraction*/) {},
            .done =
                [this, held](const absl::Status& status) {
                  status_ = status;
                  ++done_count_;
                  done_.Open();
                }};
  }
  std::shared_ptr<JobRun> Make(JobRun::Steps steps) {
    return std::make_shared<JobRun>(pool_, std::move(steps));
  }
  // The run is over, and nothing of its steps is left.
  void ExpectOver() {
    ASSERT_TRUE(done_.Wait());
    ASSERT_TRUE(pool_.WaitRunning(std::chrono::steady_clock::now() + kPatience));
    EXPECT_EQ(done_count_, 1);
    EXPECT_TRUE(held_.expired());
  }

  const Layer layer_ = MakeRandomLayer(8, 32, 64);
  Gate gate_;
  Gate done_;
  std::weak_ptr<int> held_;
  absl::Status status_ = absl::UnknownError("not done");
  std::atomic<int> loads_{0};
  std::atomic<int> kept_{0};
  std::atomic<int> done_count_{0};
  WorkerPool pool_{2, 4};
};

TEST_F(RunTest, LoadsQuantizesKeepsAndLetsGo) {
  const auto run = Make(Steps());
  run->Start(*pool_.Admit());
  ExpectOver();
  EXPECT_TRUE(status_.ok()) << status_;
  EXPECT_EQ(loads_, 1);
  EXPECT_EQ(kept_, 1);
  EXPECT_TRUE(run->cancelled().ok());
}

TEST_F(RunTest, ErrorsOfEachStepEndIt) {
  JobRun::Steps load = Steps();
  load.load = [held = held_.lock()]() -> absl::StatusOr<RunInput> {
    return absl::DataLossError("no layer");
  };
  Make(std::move(load))->Start(*pool_.Admit());
  ExpectOver();
  EXPECT_TRUE(absl::IsDataLoss(status_));
  EXPECT_EQ(kept_, 0);
}

TEST_F(RunTest, AnErrorOfKeepEndsIt) {
  JobRun::Steps steps = Steps();
  steps.keep = [held = held_.lock()](const engine::QuantizedLayer& /*layer*/,
                                     const CertificateFacts& /*facts*/) {
    return absl::ResourceExhaustedError("no room");
  };
  Make(std::move(steps))->Start(*pool_.Admit());
  ExpectOver();
  EXPECT_TRUE(absl::IsResourceExhausted(status_));
}

TEST_F(RunTest, ExceptionsBecomeStatuses) {
  JobRun::Steps steps = Steps();
  steps.load = [held = held_.lock()]() -> absl::StatusOr<RunInput> { throw std::bad_alloc(); };
  Make(std::move(steps))->Start(*pool_.Admit());
  ExpectOver();
  EXPECT_TRUE(absl::IsResourceExhausted(status_)) << status_;
}

TEST_F(RunTest, CancelledBeforeItStarts) {
  const auto run = Make(Steps());
  run->Cancel(absl::StatusCode::kDeadlineExceeded);
  run->Cancel(absl::StatusCode::kCancelled);
  run->Start(*pool_.Admit());
  ExpectOver();
  EXPECT_TRUE(absl::IsDeadlineExceeded(status_)) << status_;
  EXPECT_TRUE(absl::IsDeadlineExceeded(run->cancelled()));
  EXPECT_EQ(kept_, 0);
}

TEST_F(RunTest, CancelledWhileItWaits) {
  for (int i = 0; i < 2; ++i) {
    ASSERT_TRUE(pool_.Enqueue(*pool_.Admit(), MakeBlockingJob(pool_, gate_)).ok());
  }
  const auto run = Make(Steps());
  run->Start(*pool_.Admit());
  run->Cancel(absl::StatusCode::kCancelled);
  // Both workers are busy, so it ended here.
  EXPECT_TRUE(done_.is_open());
  EXPECT_TRUE(absl::IsCancelled(status_)) << status_;
  EXPECT_TRUE(held_.expired());
  EXPECT_EQ(loads_, 0);
  gate_.Open();
  ExpectOver();
}

TEST_F(RunTest, CancelledWhileItWaitsForWhatItNeeds) {
  JobRun::Steps steps = Steps();
  std::atomic<bool> ready{false};
  steps.ready = [&, held = held_.lock()] { return ready.load(); };
  const auto run = Make(std::move(steps));
  run->Start(*pool_.Admit());
  pool_.Poke();
  EXPECT_FALSE(done_.is_open());
  run->Cancel(absl::StatusCode::kAborted);
  ExpectOver();
  EXPECT_EQ(status_.code(), absl::StatusCode::kAborted);
}

TEST_F(RunTest, CancelledWhileItRuns) {
  Gate factoring;
  Gate cancelled;
  JobRun::Steps steps = Steps();
  std::atomic<int> later{0};
  steps.progress = [&, held = held_.lock()](engine::Phase phase, double fraction) {
    EXPECT_GE(fraction, 0);
    EXPECT_LE(fraction, 1);
    if (phase != engine::Phase::kFactor) {
      ++later;
      return;
    }
    factoring.Open();
    // However fast the layer is.
    EXPECT_TRUE(cancelled.Wait());
  };
  const auto run = Make(std::move(steps));
  run->Start(*pool_.Admit());
  ASSERT_TRUE(factoring.Wait());
  run->Cancel(absl::StatusCode::kCancelled);
  cancelled.Open();
  ExpectOver();
  EXPECT_TRUE(absl::IsCancelled(status_)) << status_;
  EXPECT_EQ(kept_, 0);
  // It is over: nothing happens.
  run->Cancel(absl::StatusCode::kDeadlineExceeded);
  EXPECT_TRUE(absl::IsCancelled(run->cancelled()));
}

// A thread cancels while another starts it; whoever is first, it ends once.
TEST_F(RunTest, StartAndCancelAtOnce) {
  for (int round = 0; round < 50; ++round) {
    Gate done;
    std::atomic<int> count{0};
    JobRun::Steps steps = Steps();
    steps.done = [&](const absl::Status& status) {
      EXPECT_TRUE(status.ok() || absl::IsCancelled(status)) << status;
      if (++count == 1) done.Open();
    };
    const auto run = Make(std::move(steps));
    std::thread canceller([&] { run->Cancel(absl::StatusCode::kCancelled); });
    run->Start(*pool_.Admit());
    ASSERT_TRUE(done.Wait());
    canceller.join();
    ASSERT_TRUE(pool_.WaitRunning(std::chrono::steady_clock::now() + kPatience));
    EXPECT_EQ(count, 1);
    EXPECT_TRUE(held_.expired());
  }
}

TEST_F(RunTest, StartAfterShutdownIsUnavailable) {
  auto slot = pool_.Admit();
  const auto run = Make(Steps());
  pool_.Shutdown();
  run->Start(*std::move(slot));
  ExpectOver();
  EXPECT_TRUE(absl::IsUnavailable(status_)) << status_;
  // As one that the shutdown finds in the queue.
  EXPECT_TRUE(absl::IsUnavailable(run->cancelled()));
}

TEST_F(RunTest, AReasonThatCameBeforeAShutdownStays) {
  auto slot = pool_.Admit();
  const auto run = Make(Steps());
  run->Cancel(absl::StatusCode::kCancelled);
  pool_.Shutdown();
  run->Start(*std::move(slot));
  ExpectOver();
  EXPECT_TRUE(absl::IsCancelled(status_)) << status_;
}

TEST_F(RunTest, AShutdownEndsWhatWaits) {
  for (int i = 0; i < 2; ++i) {
    ASSERT_TRUE(pool_.Enqueue(*pool_.Admit(), MakeBlockingJob(pool_, gate_)).ok());
  }
  const auto run = Make(Steps());
  run->Start(*pool_.Admit());
  pool_.Shutdown();
  ExpectOver();
  EXPECT_TRUE(absl::IsUnavailable(status_)) << status_;
  EXPECT_TRUE(absl::IsUnavailable(run->cancelled()));
}

}  // namespace
}  // namespace certiq::server
