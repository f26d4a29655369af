#include "job/admission.h"

#include <gtest/gtest.h>

#include <limits>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "base/status.h"
#include "contract/limits.h"
#include "job/call_run.h"
#include "support/backend_examples.h"
#include "support/layers.h"
#include "support/text.h"

namespace certiq::server::testing {
namespace {

using certiq::testing::Layer;
using certiq::testing::LayerRequestFor;
using certiq::testing::MakeRandomLayer;
using certiq::testing::RowBytes;

constexpr int64_t kHuge = std::numeric_limits<int64_t>::max();

struct Refusals : Observer {
  void Rejected(Rejection reason) override {
    const std::lock_guard lock(mu);
    reasons.push_back(reason);
  }
  std::vector<Rejection> Take() {
    const std::lock_guard lock(mu);
    return std::exchange(reasons, {});
  }
  std::mutex mu;
  std::vector<Rejection> reasons;
};

class AdmissionTest : public ::testing::Test {
 protected:
  void SetUp() override {
    server_.options.memory_bytes = kHuge / 2;
    server_.options.observer = &refusals_;
    server_.options.queue_limit = 2;
    server_.Start();
  }

  absl::StatusOr<Admission> Try(const JobRequest& request, const Tenant& tenant = {}) {
    return Admit(server_->environment(), server_->calibrations(), tenant, request);
  }
  // A job of the calibration, made first where there is none.
  JobRequest Stored() {
    if (calibration_id_.empty()) calibration_id_ = Calibrate(server_, layer_);
    return JobRequestFor(layer_, calibration_id_);
  }
  static void ExpectInvalid(const absl::Status& status, const char* field, const char* text) {
    EXPECT_TRUE(absl::IsInvalidArgument(status)) << status;
    EXPECT_EQ(base::FieldOf(status).value_or("(none)"), field) << status;
    EXPECT_CONTAINS(status.message(), text);
  }
  static std::string Precondition(const absl::Status& status) {
    EXPECT_TRUE(absl::IsFailedPrecondition(status)) << status;
    const auto precondition = base::PreconditionOf(status);
    return precondition.has_value() ? precondition->type : "(none)";
  }

  Refusals refusals_;
  const Layer layer_ = MakeRandomLayer(5, 12, 300);
  Server server_{StoreKind::kMemory};
  std::string calibration_id_;
};

TEST_F(AdmissionTest, ReservesFirstAndGivesEverythingBack) {
  const JobRequest request = LayerRequestFor(layer_);
  const engine::Cancellation cancellation;
  {
    auto upload = server_->jobs().Begin({}, request, cancellation);
    ASSERT_TRUE(upload.ok()) << upload.status();
    const int64_t peak = server_->memory().reserved();
    EXPECT_EQ(peak, (*upload)->admission().memory.bytes());
    ASSERT_TRUE((*upload)->AppendWeights(0, RowBytes(layer_.weights, 12, 0, 5)).ok());
    ASSERT_TRUE((*upload)->AppendActivations(0, RowBytes(layer_.x, 12, 0, 300), {}).ok());
    EXPECT_EQ(server_->memory().reserved(), peak);
    const int64_t engine = EngineBytes(request, (*upload)->admission().calibration);
    EXPECT_EQ(engine, engine::PeakBytes(request.spec, 5, 12));
    // The messages of the upload come on top of what the engine needs.
    EXPECT_GT(peak, engine);
  }
  EXPECT_EQ(server_->memory().reserved(), 0);
}

TEST_F(AdmissionTest, OverBudgetIsRefusedWithADelayUnlessItNeverFits) {
  const JobRequest request = LayerRequestFor(layer_);
  int64_t peak = 0;
  {
    const auto first = Try(request);
    ASSERT_TRUE(first.ok());
    peak = first->memory.bytes();
  }
  const auto first = Try(request, {"t", {.memory_bytes = peak}});
  ASSERT_TRUE(first.ok()) << first.status();
  const auto second = Try(request, {"t", {.memory_bytes = peak}});
  EXPECT_TRUE(absl::IsResourceExhausted(second.status()));
  EXPECT_EQ(base::RetryAfterOf(second.status()), base::kRetrySoon);
  const auto never = Try(request, {"small", {.memory_bytes = peak - 1}});
  EXPECT_TRUE(absl::IsResourceExhausted(never.status()));
  EXPECT_EQ(base::RetryAfterOf(never.status()), std::nullopt);
  EXPECT_EQ(refusals_.Take(), (std::vector{Rejection::kOverBudget, Rejection::kOverBudget}));
}

TEST_F(AdmissionTest, HugeLayerIsCountedWithoutOverflow) {
  JobRequest request = LayerRequestFor(layer_);
  request.rows = kMaxWeights / kMaxFeatures;
  request.features = request.activations->features = kMaxFeatures;
  request.activations->tokens = kMaxTokens;
  request.weight_dtype = request.activations->x_dtype = engine::DType::kF64;
  const auto admitted = Try(request);
  ASSERT_TRUE(admitted.ok()) << admitted.status();
  EXPECT_GT(admitted->memory.bytes(), kMaxWeights);
}

TEST_F(AdmissionTest, SizesOutOfRangeNameTheField) {
  for (const int64_t bad : {int64_t{0}, int64_t{-1}, kMaxRows + 1, kHuge}) {
    JobRequest request = LayerRequestFor(layer_);
    request.rows = bad;
    ExpectInvalid(Try(request).status(), "weight.shape", "output channels");
  }
  for (const int64_t bad : {int64_t{0}, int64_t{-7}, kMaxFeatures + 1, kHuge}) {
    JobRequest request = LayerRequestFor(layer_);
    request.features = request.activations->features = bad;
    ExpectInvalid(Try(request).status(), "weight.shape", "input features");
  }
  for (const int64_t bad : {int64_t{0}, int64_t{-7}, kMaxTokens + 1, kHuge}) {
    JobRequest request = LayerRequestFor(layer_);
    request.activations->tokens = bad;
    ExpectInvalid(Try(request).status(), "x.shape", "tokens");
  }
  JobRequest request = LayerRequestFor(layer_);
  request.rows = kMaxRows;
  request.features = request.activations->features = kMaxFeatures;
  ExpectInvalid(Try(request).status(), "weight.shape", "elements");
  EXPECT_EQ(server_->memory().reserved(), 0);
}

TEST_F(AdmissionTest, FeaturesMustAgree) {
  JobRequest request = LayerRequestFor(layer_);
  request.activations->features = 13;
  ExpectInvalid(Try(request).status(), "x.shape", "[300, 13]");
  request = LayerRequestFor(layer_);
  request.activations->x_quantized_dtype = engine::DType::kF32;
  request.activations->quantized_tokens = 299;
  request.activations->quantized_features = 12;
  ExpectInvalid(Try(request).status(), "x_quantized.shape", "[299, 12]");
  for (const bool stored : {false, true}) {
    request = Stored();
    request.stored = stored;
    request.features = 11;
    ExpectInvalid(Try(request).status(), "weight.shape", "expected 12 input features");
  }
}

TEST_F(AdmissionTest, WeightsMustBeFloating) {
  JobRequest request = LayerRequestFor(layer_);
  request.weight_dtype = engine::DType::kI32;
  ExpectInvalid(Try(request).status(), "weight.dtype", "got I32");
  request.weight_dtype = engine::DType::kF16;
  request.activations->x_dtype = engine::DType::kU8;
  EXPECT_TRUE(Try(request).ok());
}

TEST_F(AdmissionTest, PrioritiesHaveARange) {
  for (const int32_t bad : {-101, 101, std::numeric_limits<int32_t>::max()}) {
    JobRequest request = Stored();
    request.priority = bad;
    ExpectInvalid(Try(request).status(), "priority", "expected -100 to 100");
  }
  for (const int32_t good : {-100, 100}) {
    JobRequest request = Stored();
    request.priority = good;
    EXPECT_TRUE(Try(request).ok());
  }
}

// The spec is checked against the layer and the tokens at the header, however the job is asked for.
TEST_F(AdmissionTest, TheSpecMustFitTheLayerAndTheTokens) {
  std::vector<JobRequest> requests = {LayerRequestFor(layer_), Stored(), Stored()};
  requests[1].stored = false;
  for (const JobRequest& one : requests) {
    JobRequest request = one;
    request.spec.min_tokens = 301;
    EXPECT_EQ(Precondition(Try(request).status()), "TOKENS");
    request.spec.min_tokens = 300;
    EXPECT_TRUE(Try(request).ok());
    request = one;
    request.spec.method = engine::Method::kOptq;
    request.spec.damping_rule = engine::DampingRule::kHeldOut;
    EXPECT_EQ(Precondition(Try(request).status()), "HELD_OUT");
    // Which does not damp needs no tokens held out.
    request.spec.method = engine::Method::kNearest;
    EXPECT_TRUE(Try(request).ok());
  }
}

// Tokens that will be held out are none to fit.
TEST_F(AdmissionTest, HeldOutTokensAreNotCounted) {
  JobRequest request = LayerRequestFor(layer_);
  request.activations->held_out_fraction = 0.5;
  request.activations->sequence_rows = 10;
  const engine::HeldOutSplit split(0.5, 10, "");
  int64_t fit = 0;
  for (int64_t row = 0; row < 300; ++row) fit += split.IsHeldOut(row) ? 0 : 1;
  ASSERT_LT(fit, 200);
  request.spec.min_tokens = fit;
  EXPECT_TRUE(Try(request).ok());
  request.spec.min_tokens = fit + 1;
  EXPECT_EQ(Precondition(Try(request).status()), "TOKENS");
}

TEST_F(AdmissionTest, TheCalibrationMustBeThereAndFinalized) {
  const auto open = server_->calibrations().Create({}, Wanted{.features = 12}.request());
  ASSERT_TRUE(open.ok());
  for (const bool stored : {false, true}) {
    JobRequest request = Stored();
    request.stored = stored;
    EXPECT_TRUE(absl::IsNotFound(Try(request, {"other", {}}).status()));
    request.calibration_id = open->record.id();
    EXPECT_EQ(Precondition(Try(request).status()), "NOT_FINALIZED");
  }
}

// From the header on, until the admission goes.
TEST_F(AdmissionTest, TheCalibrationIsPinned) {
  for (const bool stored : {false, true}) {
    JobRequest request = Stored();
    request.stored = stored;
    const CalibrationCalls calibration(server_, calibration_id_);
    {
      const auto admitted = Try(request);
      ASSERT_TRUE(admitted.ok()) << admitted.status();
      EXPECT_EQ(calibration.View().jobs, 1);
      EXPECT_EQ(Precondition(calibration.Remove()), "IN_USE");
    }
    EXPECT_EQ(calibration.View().jobs, 0);
  }
}

TEST_F(AdmissionTest, QuotasAndTheQueueHaveRoomOrNot) {
  for (const bool stored : {false, true}) {
    JobRequest request = stored ? Stored() : LayerRequestFor(layer_);
    const Tenant one{"", {.jobs = 1}};
    {
      const auto first = Try(request, one);
      ASSERT_TRUE(first.ok()) << first.status();
      const absl::Status quota = Try(request, one).status();
      EXPECT_TRUE(absl::IsResourceExhausted(quota)) << quota;
      EXPECT_EQ(base::RetryAfterOf(quota), base::kRetrySoon);
      EXPECT_EQ(refusals_.Take(), std::vector{Rejection::kQuota});
      const auto second = Try(request);
      ASSERT_TRUE(second.ok()) << second.status();
      const absl::Status queue = Try(request).status();
      EXPECT_TRUE(absl::IsResourceExhausted(queue)) << queue;
      EXPECT_CONTAINS(queue.message(), "the queue is full");
      EXPECT_EQ(base::RetryAfterOf(queue), base::kRetrySoon);
      EXPECT_EQ(refusals_.Take(), std::vector{Rejection::kQueueFull});
    }
    const absl::Status none = Try(request, {"", {.jobs = 0}}).status();
    EXPECT_TRUE(absl::IsResourceExhausted(none));
    EXPECT_EQ(base::RetryAfterOf(none), std::nullopt);
    refusals_.Take();
    EXPECT_TRUE(Try(request, one).ok());
  }
}

TEST_F(AdmissionTest, StoredJobsTakeRoomInTheStore) {
  const JobRequest request = Stored();
  const int64_t bytes = StoredBytes(5, 12, engine::DType::kF32, request.spec);
  // The record, with its spec.
  constexpr int64_t kRecordBytes = 4096;
  const int64_t before = server_->memory().reserved();
  const auto admitted = Try(request);
  ASSERT_TRUE(admitted.ok()) << admitted.status();
  EXPECT_GT(admitted->storage.bytes(), bytes);
  EXPECT_LT(admitted->storage.bytes(), bytes + kRecordBytes);
  // The messages on their way: three of all the weights at most.
  EXPECT_GE(admitted->memory.bytes(), 3 * 5 * 12 * 4);
  // Without a disk, memory is the store.
  EXPECT_EQ(server_->memory().reserved(),
            before + admitted->storage.bytes() + admitted->memory.bytes());
  // What could never run is refused at once.
  const absl::Status never = Try(request, {"", {.memory_bytes = 1000}}).status();
  EXPECT_TRUE(absl::IsResourceExhausted(never)) << never;
  EXPECT_CONTAINS(never.message(), "It cannot fit");
  EXPECT_EQ(base::RetryAfterOf(never), std::nullopt);
}

TEST_F(AdmissionTest, NothingIsAdmittedWhileTheServerStops) {
  const JobRequest stored = Stored();
  server_->StopStarting();
  for (const JobRequest& request : {LayerRequestFor(layer_), stored, JobRequest()}) {
    const absl::Status refused = Try(request).status();
    EXPECT_TRUE(absl::IsUnavailable(refused)) << refused;
    EXPECT_TRUE(base::RetryAfterOf(refused).has_value());
  }
}

}  // namespace
}  // namespace certiq::server::testing
