#include "calibration/split_accumulator.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "engine/gram/held_out_split.h"
#include "job/upload.h"
#include "support/backend_examples.h"
#include "support/gate.h"
#include "support/layers.h"

namespace certiq::server::testing {
namespace {

using certiq::testing::Layer;
using certiq::testing::MakeRandomLayer;
using certiq::testing::RowBytes;

constexpr int64_t kFeatures = 11;
constexpr int64_t kTokens = 2500;
constexpr double kFraction = 0.25;
constexpr int64_t kBlockRows = 16;

// Every number of the sums, to be compared bit for bit.
std::vector<double> Numbers(const engine::Statistics& sums) {
  std::vector<double> numbers = {static_cast<double>(sums.tokens)};
  for (int64_t i = 0; i < kFeatures; ++i) {
    for (int64_t j = i; j < kFeatures; ++j) {
      numbers.push_back(sums.gram.at(i, j));
      if (sums.mismatch.has_value()) numbers.push_back(sums.mismatch->residual.at(i, j));
    }
  }
  if (sums.mismatch.has_value()) {
    numbers.insert(numbers.end(), sums.mismatch->cross.begin(), sums.mismatch->cross.end());
  }
  return numbers;
}

struct Both {
  std::vector<double> fit;
  std::vector<double> held_out;
  bool operator==(const Both&) const = default;
};
Both NumbersOf(const SplitSums& sums) {
  return {Numbers(*sums.fit),
          sums.held_out == nullptr ? std::vector<double>() : Numbers(*sums.held_out)};
}

class SplitAccumulatorTest : public ::testing::Test {
 protected:
  engine::TokenRows Rows(const Layer& layer, int64_t begin) const {
    return {engine::DType::kF32, RowBytes(layer.x, kFeatures, begin, kTokens).data(), "x"};
  }
  // Appends all rows in chunks of so many; returns how many were held out.
  int64_t Append(SplitAccumulator& sums, const engine::HeldOutSplit& split, int64_t chunk,
                 bool mismatched = false) {
    int64_t held_out = 0;
    for (int64_t row = 0; row < kTokens; row += chunk) {
      const engine::TokenRows quantized = Rows(quantized_, row);
      const auto appended =
          sums.Append(Rows(layer_, row), mismatched ? &quantized : nullptr, row,
                      std::min(chunk, kTokens - row), kFeatures, split, executor_, nullptr);
      EXPECT_TRUE(appended.ok()) << appended.status();
      held_out += *appended;
    }
    return held_out;
  }

  engine::SerialExecutor executor_;
  const Layer layer_ = MakeRandomLayer(1, kFeatures, kTokens);
  const Layer quantized_ = MakeRandomLayer(1, kFeatures, kTokens, 2);
  const engine::HeldOutSplit split_{kFraction, kBlockRows, "s"};
};

TEST_F(SplitAccumulatorTest, ChunksDoNotChangeTheSums) {
  for (const bool mismatched : {false, true}) {
    std::optional<Both> expected;
    // Chunks of one row, within blocks of the split, across them, and across blocks of the fold.
    for (const int64_t chunk : {kTokens, int64_t{1}, int64_t{7}, kBlockRows, int64_t{100},
                                engine::StatisticsAccumulator::kBlockRows + 1}) {
      SplitAccumulator sums(kFeatures, mismatched, /*holds_out=*/true);
      const int64_t held_out = Append(sums, split_, chunk, mismatched);
      const SplitSums split = std::move(sums).Finish(executor_);
      EXPECT_EQ(split.held_out->tokens, held_out);
      EXPECT_EQ(split.fit->tokens, kTokens - held_out);
      const Both numbers = NumbersOf(split);
      if (!expected.has_value()) expected = numbers;
      EXPECT_EQ(numbers, *expected) << chunk;
    }
  }
}

TEST_F(SplitAccumulatorTest, RowsGoWhereTheSplitSays) {
  SplitAccumulator sums(kFeatures, /*mismatched=*/false, /*holds_out=*/true);
  const int64_t held_out = Append(sums, split_, 33);
  const SplitSums split = std::move(sums).Finish(executor_);
  const auto taken = [&](int64_t row) { return split_.IsHeldOut(row); };
  int64_t expected = 0;
  for (int64_t row = 0; row < kTokens; ++row) expected += taken(row) ? 1 : 0;
  EXPECT_EQ(held_out, expected);
  EXPECT_LT(Difference(*split.held_out, GramOf(layer_, taken)), 1e-6);
  EXPECT_LT(Difference(*split.fit, GramOf(layer_, [&](int64_t row) { return !taken(row); })), 1e-6);
}

TEST_F(SplitAccumulatorTest, NothingIsHeldOutWhereNothingIsKeptFor) {
  SplitAccumulator sums(kFeatures, /*mismatched=*/false, /*holds_out=*/false);
  EXPECT_FALSE(sums.holds_out());
  EXPECT_EQ(Append(sums, split_, 100), 0);
  const SplitSums split = std::move(sums).Finish(executor_);
  EXPECT_EQ(split.held_out, nullptr);
  EXPECT_EQ(split.fit->tokens, kTokens);
  EXPECT_LT(Difference(*split.fit, GramOf(layer_)), 1e-6);
}

TEST_F(SplitAccumulatorTest, SumsGoOnFromWhatWasFlushed) {
  SplitAccumulator first(kFeatures, /*mismatched=*/true, /*holds_out=*/true);
  Append(first, split_, 100, /*mismatched=*/true);
  SplitAccumulator second(first.Flush(false, executor_), first.Flush(true, executor_));
  EXPECT_TRUE(second.holds_out());
  Append(first, split_, 100, /*mismatched=*/true);
  Append(second, split_, 77, /*mismatched=*/true);
  const Both expected = NumbersOf(std::move(first).Finish(executor_));
  EXPECT_EQ(NumbersOf(std::move(second).Finish(executor_)), expected);
}

TEST_F(SplitAccumulatorTest, ReadyMadeSumsAreAddedToAPortion) {
  engine::Statistics more;
  more.gram = engine::UpperTriangle<double>(kFeatures);
  more.gram.at(2, 3) = 1000;
  more.tokens = 5;
  SplitAccumulator sums(kFeatures, /*mismatched=*/false, /*holds_out=*/true);
  sums.Add(/*held_out=*/true, more);
  sums.Add(/*held_out=*/false, more);
  sums.Add(/*held_out=*/false, more);
  EXPECT_EQ(sums.Flush(true, executor_).tokens, 5);
  EXPECT_EQ(sums.Flush(false, executor_).tokens, 10);
  EXPECT_EQ(sums.Flush(false, executor_).gram.at(2, 3), 2000);
}

TEST_F(SplitAccumulatorTest, CancellationStopsIt) {
  SplitAccumulator sums(kFeatures, /*mismatched=*/false, /*holds_out=*/true);
  engine::Cancellation cancellation;
  cancellation.Cancel(absl::StatusCode::kDeadlineExceeded);
  EXPECT_TRUE(absl::IsDeadlineExceeded(
      sums.Append(Rows(layer_, 0), nullptr, 0, kTokens, kFeatures, split_, executor_, &cancellation)
          .status()));
}

TEST_F(SplitAccumulatorTest, ItsBytesAreThoseOfItsPortions) {
  const int64_t one = engine::StatisticsAccumulator::BytesFor(kFeatures);
  EXPECT_EQ(SplitAccumulator::BytesFor(kFeatures, false, false), one);
  EXPECT_EQ(SplitAccumulator::BytesFor(kFeatures, false, true), 2 * one);
}

// The sums are the same bits whichever way the rows take: an Accumulate stream, an upload that
// brings its own X, or this class alone.
TEST_F(SplitAccumulatorTest, StreamsAndUploadsMakeTheSameSums) {
  // The stream of an upload has no name.
  const engine::HeldOutSplit split(kFraction, kBlockRows, "");
  SplitAccumulator alone(kFeatures, /*mismatched=*/false, /*holds_out=*/true);
  Append(alone, split, kTokens);
  const Both expected = NumbersOf(std::move(alone).Finish(executor_));

  Server server(StoreKind::kMemory);
  server.Start();
  const engine::Cancellation cancellation;
  for (const int64_t chunk : {int64_t{41}, kTokens}) {
    const auto made = server->calibrations().Create(
        {}, Wanted{.features = kFeatures, .held_out_fraction = kFraction, .sequence_rows = 16}
                .request());
    ASSERT_TRUE(made.ok()) << made.status();
    const CalibrationCalls calibration(server, made->record.id());
    ASSERT_TRUE(SendRows(calibration, "", layer_, chunk).ok());
    ASSERT_TRUE(calibration.Finalize(kTokens).ok());
    EXPECT_EQ(NumbersOf(calibration.Sums().value()), expected) << chunk;

    JobRequest request = certiq::testing::LayerRequestFor(layer_);
    request.activations->held_out_fraction = kFraction;
    request.activations->sequence_rows = kBlockRows;
    Upload upload(server->environment(), request, Admission(), cancellation, std::nullopt);
    ASSERT_TRUE(upload.AppendWeights(0, RowBytes(layer_.weights, kFeatures, 0, 1)).ok());
    for (int64_t row = 0; row < kTokens; row += chunk) {
      ASSERT_TRUE(
          upload
              .AppendActivations(
                  row, RowBytes(layer_.x, kFeatures, row, std::min(kTokens, row + chunk)), {})
              .ok());
    }
    ASSERT_TRUE(upload.Finish().ok());
    EXPECT_EQ(NumbersOf(upload.TakeSums()), expected) << chunk;
  }
}

}  // namespace
}  // namespace certiq::server::testing
