#include "calibration/calibration.h"

#include <gtest/gtest.h>

#include <atomic>
#include <cmath>
#include <limits>
#include <memory>
#include <optional>
#include <set>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "base/clock.h"
#include "support/backend_examples.h"
#include "support/gate.h"
#include "support/text.h"

namespace certiq::server::testing {
namespace {

using certiq::testing::Gate;
using certiq::testing::Layer;
using certiq::testing::MakeRandomLayer;
using certiq::testing::RowBytes;

class CalibrationTest : public ::testing::TestWithParam<StoreKind> {
 protected:
  void SetUp() override {
    server_.Start();
    ASSERT_FALSE(HasFatalFailure());
  }

  std::shared_ptr<Calibration> Create(Wanted wanted = {}) {
    wanted.features = layer_.features;
    auto made = server_->calibrations().Create({}, wanted.request());
    EXPECT_TRUE(made.ok()) << made.status();
    return made.value_or(nullptr);
  }
  bool stays() const { return GetParam() != StoreKind::kMemory; }
  absl::Status Fold(Calibration& calibration, LiveStream& live, int64_t sequence, int64_t begin,
                    int64_t end) {
    const auto bytes = RowBytes(layer_.x, layer_.features, begin, end);
    return InStrand(calibration, [&] { return calibration.Fold(live, sequence, bytes, {}); });
  }
  static absl::Status Finalize(Calibration& calibration, std::optional<int64_t> tokens = {},
                               const std::vector<std::string>& streams = {}) {
    return InStrand(calibration, [&] { return calibration.Finalize(tokens, streams); });
  }
  static absl::Status Commit(Calibration& calibration) {
    return InStrand(calibration, [&] { return calibration.Commit(); });
  }
  static engine::SharedStatistics Export(Calibration& calibration, bool held_out = false) {
    engine::SharedStatistics sums;
    const absl::Status status = InStrand(calibration, [&] {
      auto snapshot = calibration.Export(held_out);
      if (snapshot.ok() && snapshot->sums != nullptr) {
        // A copy: what is snapshot stays as long as its reservation.
        sums = std::make_shared<const engine::Statistics>(*snapshot->sums);
      }
      return snapshot.status();
    });
    EXPECT_TRUE(status.ok()) << status;
    return sums;
  }

  const Layer layer_ = MakeRandomLayer(3, 12, 700);
  Server server_{GetParam()};
};

TEST_P(CalibrationTest, RepeatsAreIgnoredAndGapsRefused) {
  const auto calibration = Create();
  const auto live = NewStream("s");
  ASSERT_TRUE(InStrand(*calibration, [&] { return calibration->Open(live); }).ok());
  EXPECT_TRUE(Fold(*calibration, *live, 0, 0, 300).ok());
  EXPECT_TRUE(Fold(*calibration, *live, 0, 0, 300).ok());
  for (const int64_t sequence : {int64_t{2}, int64_t{-1}, std::numeric_limits<int64_t>::max()}) {
    const absl::Status gap = Fold(*calibration, *live, sequence, 300, 700);
    EXPECT_TRUE(absl::IsInvalidArgument(gap)) << gap;
    EXPECT_CONTAINS(gap.message(), "expected 1");
  }
  EXPECT_TRUE(Fold(*calibration, *live, 1, 300, 700).ok());
  EXPECT_TRUE(Fold(*calibration, *live, 0, 5, 6).ok());
  const StreamView view = calibration->Look(*live).first;
  EXPECT_EQ(view.received, 2);
  EXPECT_EQ(view.tokens, 700);
  EXPECT_EQ(view.durable, stays() ? 0 : 2);
  EXPECT_EQ(calibration->View(false).record.tokens, 700);
  EXPECT_LT(Difference(*Export(*calibration), GramOf(layer_)), 1e-6);
}

TEST_P(CalibrationTest, ARefusedChunkChangesNothing) {
  Layer broken = layer_;
  broken.x[static_cast<size_t>(500 * layer_.features + 3)] = std::nanf("");
  const auto calibration = Create({.held_out_fraction = 0.5, .sequence_rows = 10});
  const auto live = NewStream("s");
  ASSERT_TRUE(InStrand(*calibration, [&] { return calibration->Open(live); }).ok());
  EXPECT_TRUE(Fold(*calibration, *live, 0, 0, 100).ok());
  const auto refuse = [&](std::span<const std::byte> x, std::span<const std::byte> more) {
    const absl::Status refused =
        InStrand(*calibration, [&] { return calibration->Fold(*live, 1, x, more); });
    EXPECT_TRUE(absl::IsInvalidArgument(refused)) << refused;
    return std::string(refused.message());
  };
  const auto whole = RowBytes(broken.x, broken.features, 100, 700);
  EXPECT_CONTAINS(refuse(whole, {}), "500");
  EXPECT_CONTAINS(refuse(whole.first(7), {}), "whole rows");
  EXPECT_CONTAINS(refuse({}, {}), "at least one");
  const auto rows = RowBytes(layer_.x, layer_.features, 100, 110);
  EXPECT_CONTAINS(refuse(rows, rows), "matched");
  EXPECT_EQ(calibration->Look(*live).first.received, 1);
  EXPECT_TRUE(Fold(*calibration, *live, 1, 100, 700).ok());
  ASSERT_TRUE(Finalize(*calibration, 700).ok());
  const engine::HeldOutSplit split(0.5, 10, "s");
  EXPECT_LT(Difference(*Export(*calibration),
                       GramOf(layer_, [&](int64_t row) { return !split.IsHeldOut(row); })),
            1e-6);
}

TEST_P(CalibrationTest, EachStreamIsSplitByItsName) {
  const auto calibration = Create({.held_out_fraction = 0.25, .sequence_rows = 16});
  std::vector<double> fit(static_cast<size_t>(layer_.features * layer_.features));
  std::vector<double> held_out = fit;
  int64_t held_out_tokens = 0;
  for (const std::string id : {"a", "b", "rank 3"}) {
    ASSERT_TRUE(SendRows(*calibration, id, layer_, 37).ok());
    const engine::HeldOutSplit split(0.25, 16, id);
    const auto taken = [&](int64_t row) { return split.IsHeldOut(row); };
    const std::vector<double> out = GramOf(layer_, taken);
    const std::vector<double> in = GramOf(layer_, [&](int64_t row) { return !taken(row); });
    for (size_t i = 0; i < fit.size(); ++i) {
      fit[i] += in[i];
      held_out[i] += out[i];
    }
    for (int64_t row = 0; row < layer_.tokens; ++row) held_out_tokens += taken(row) ? 1 : 0;
  }
  ASSERT_TRUE(Finalize(*calibration, 3 * layer_.tokens, {"a", "b", "rank 3"}).ok());
  const auto pin = calibration->PinFinalized();
  ASSERT_TRUE(pin.ok());
  const auto sums = calibration->Sums();
  ASSERT_TRUE(sums.ok()) << sums.status();
  EXPECT_EQ(sums->held_out->tokens, held_out_tokens);
  EXPECT_EQ(sums->fit->tokens, 3 * layer_.tokens - held_out_tokens);
  EXPECT_EQ(calibration->View(false).record.held_out_tokens, held_out_tokens);
  EXPECT_LT(Difference(*sums->fit, fit), 1e-6);
  EXPECT_LT(Difference(*sums->held_out, held_out), 1e-6);
}

TEST_P(CalibrationTest, ANewerCallTakesTheStreamOver) {
  const auto calibration = Create();
  Gate told;
  const auto older = NewStream("s", [&] { told.Open(); });
  const auto newer = NewStream("s");
  ASSERT_TRUE(InStrand(*calibration, [&] { return calibration->Open(older); }).ok());
  EXPECT_TRUE(Fold(*calibration, *older, 0, 0, 100).ok());
  EXPECT_TRUE(calibration->Look(*older).first.live);
  ASSERT_TRUE(InStrand(*calibration, [&] { return calibration->Open(newer); }).ok());
  EXPECT_TRUE(told.is_open());
  EXPECT_EQ(calibration->Look(*older).second.code(), absl::StatusCode::kAborted);
  EXPECT_EQ(Fold(*calibration, *older, 1, 100, 200).code(), absl::StatusCode::kAborted);
  // The older's end does not end the newer.
  calibration->Close(*older);
  EXPECT_TRUE(calibration->Look(*newer).first.live);
  EXPECT_EQ(calibration->Look(*newer).first.received, 1);
  EXPECT_TRUE(Fold(*calibration, *newer, 1, 100, 700).ok());
  calibration->Close(*newer);
  ASSERT_TRUE(Finalize(*calibration, 700, {"s"}).ok());
}

TEST_P(CalibrationTest, FinalizeChecksWhatIsExpected) {
  const auto calibration = Create();
  EXPECT_CONTAINS(Finalize(*calibration).message(), "no tokens");
  const auto live = NewStream("s");
  ASSERT_TRUE(InStrand(*calibration, [&] { return calibration->Open(live); }).ok());
  EXPECT_CONTAINS(Finalize(*calibration, {}, {"s"}).message(), "sent nothing");
  EXPECT_TRUE(Fold(*calibration, *live, 0, 0, 700).ok());
  EXPECT_CONTAINS(Finalize(*calibration, {}, {"s"}).message(), "open call");
  EXPECT_CONTAINS(Finalize(*calibration, {}, {"other"}).message(), "sent nothing");
  EXPECT_CONTAINS(Finalize(*calibration, 699).message(), "there are 700");
  EXPECT_TRUE(absl::IsFailedPrecondition(Finalize(*calibration, 699)));
  EXPECT_TRUE(absl::IsFailedPrecondition(calibration->PinFinalized().status()));

  // Who is not expected to have ended is ended.
  EXPECT_TRUE(Finalize(*calibration, 700).ok());
  EXPECT_TRUE(absl::IsFailedPrecondition(calibration->Look(*live).second));
  EXPECT_FALSE(Fold(*calibration, *live, 1, 0, 1).ok());
  calibration->Close(*live);
  EXPECT_TRUE(Finalize(*calibration, 700, {"s"}).ok());
  EXPECT_TRUE(absl::IsFailedPrecondition(Finalize(*calibration, 1)));
  EXPECT_TRUE(absl::IsFailedPrecondition(SendRows(*calibration, "late", layer_, 100)));
}

TEST_P(CalibrationTest, ImportAddsOnce) {
  const auto calibration = Create({.held_out_fraction = 0.5, .sequence_rows = 10});
  const auto source = Create();
  ASSERT_TRUE(SendRows(*source, "s", layer_, 100).ok());
  const engine::SharedStatistics sums = Export(*source);
  const auto import = [&](Calibration& to, const std::string& id, bool held_out) {
    absl::StatusOr<bool> known = false;
    static_cast<void>(InStrand(to, [&] {
      known = to.Import(id, held_out, *sums);
      return absl::OkStatus();
    }));
    return known;
  };
  EXPECT_EQ(import(*calibration, "i", false).value(), false);
  EXPECT_EQ(import(*calibration, "i", false).value(), true);
  EXPECT_EQ(import(*calibration, "j", true).value(), false);
  ASSERT_TRUE(SendRows(*calibration, "stream", layer_, 100).ok());
  EXPECT_TRUE(absl::IsFailedPrecondition(import(*calibration, "stream", false).status()));
  EXPECT_TRUE(absl::IsFailedPrecondition(SendRows(*calibration, "i", layer_, 100)));
  EXPECT_TRUE(absl::IsFailedPrecondition(import(*source, "k", true).status()));
  ASSERT_TRUE(Finalize(*calibration, 3 * layer_.tokens, {"i", "j", "stream"}).ok());
  EXPECT_EQ(import(*calibration, "i", false).value(), true);
  EXPECT_TRUE(absl::IsFailedPrecondition(import(*calibration, "new", false).status()));
  for (const StreamView& stream : calibration->View(true).streams) {
    EXPECT_EQ(stream.imported, stream.id != "stream");
    EXPECT_EQ(stream.tokens, layer_.tokens);
    EXPECT_EQ(stream.durable, stream.received);
  }
}

TEST_P(CalibrationTest, AnExportIsOfOneMoment) {
  const auto calibration = Create();
  const int64_t before = server_->memory().reserved();
  const auto live = NewStream("s");
  ASSERT_TRUE(InStrand(*calibration, [&] { return calibration->Open(live); }).ok());
  EXPECT_TRUE(Fold(*calibration, *live, 0, 0, 333).ok());
  std::optional<Snapshot> snapshot;
  ASSERT_TRUE(InStrand(*calibration, [&] {
                auto taken = calibration->Export(false);
                absl::Status status = taken.status();
                if (status.ok()) snapshot = *std::move(taken);
                return status;
              }).ok());
  EXPECT_GT(server_->memory().reserved(), before);
  EXPECT_TRUE(Fold(*calibration, *live, 1, 333, 700).ok());
  EXPECT_EQ(snapshot->sums->tokens, 333);
  EXPECT_LT(Difference(*snapshot->sums, GramOf(layer_, [](int64_t row) { return row < 333; })),
            1e-6);
  snapshot.reset();
  EXPECT_EQ(server_->memory().reserved(), before);
  EXPECT_EQ(Export(*calibration, true), nullptr);
  ASSERT_TRUE(Finalize(*calibration).ok());
  EXPECT_EQ(Export(*calibration)->tokens, 700);
}

TEST_P(CalibrationTest, PinnedOnesStay) {
  const auto calibration = Calibrate(*server_.operator->(), layer_);
  ASSERT_NE(calibration, nullptr);
  const auto remove = [&] {
    return InStrand(*calibration, [&] { return server_->calibrations().Remove(calibration); });
  };
  const base::UnixMicros late = std::numeric_limits<base::UnixMicros>::max();
  {
    auto pin = calibration->PinFinalized();
    ASSERT_TRUE(pin.ok());
    EXPECT_EQ(calibration->View(false).jobs, 1);
    EXPECT_TRUE(absl::IsFailedPrecondition(remove()));
    EXPECT_FALSE(calibration->Expired(late));
  }
  EXPECT_TRUE(calibration->Expired(late));
  EXPECT_TRUE(remove().ok());
  EXPECT_TRUE(absl::IsNotFound(remove()));
  EXPECT_TRUE(absl::IsNotFound(calibration->PinFinalized().status()));
  EXPECT_TRUE(absl::IsNotFound(server_->calibrations().Find({}, calibration->id()).status()));
  EXPECT_EQ(server_->memory().reserved(), 0);
}

TEST_P(CalibrationTest, ExpiresAfterItsLastCallAndItsTime) {
  const auto calibration = Create({.ttl_micros = 1'000'000});
  const auto live = NewStream("s");
  ASSERT_TRUE(InStrand(*calibration, [&] { return calibration->Open(live); }).ok());
  const base::UnixMicros end = calibration->View(false).expire_time;
  EXPECT_FALSE(calibration->Expired(end));
  calibration->Close(*live);
  EXPECT_FALSE(calibration->Expired(end - 1));
  EXPECT_TRUE(calibration->Expired(end));
  const auto gone = Create({.ttl_micros = 0});
  server_->calibrations().Tick({});
  Settle(*server_.operator->());
  EXPECT_EQ(server_->calibrations().FindById(gone->id()), nullptr);
  EXPECT_NE(server_->calibrations().FindById(calibration->id()), nullptr);
}

INSTANTIATE_TEST_SUITE_P(Stores, CalibrationTest,
                         ::testing::Values(StoreKind::kMemory, StoreKind::kSqlite),
                         [](const auto& about) { return NameOf(about.param); });

}  // namespace
}  // namespace certiq::server::testing
