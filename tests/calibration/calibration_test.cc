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
#include "calibration/calibration_desk.h"
#include "engine/gram/held_out_split.h"
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

  CalibrationCalls Create(Wanted wanted = {}) {
    wanted.features = layer_.features;
    auto made = server_->calibrations().Create({}, wanted.request());
    EXPECT_TRUE(made.ok()) << made.status();
    return CalibrationCalls(server_, made.ok() ? made->record.id() : "");
  }
  bool stays() const { return GetParam() != StoreKind::kMemory; }
  std::span<const std::byte> Rows(int64_t begin, int64_t end) const {
    return RowBytes(layer_.x, layer_.features, begin, end);
  }
  // A copy: what is snapshot stays as long as its reservation.
  static engine::SharedStatistics Export(const CalibrationCalls& calibration,
                                         bool held_out = false) {
    const auto snapshot = calibration.Export(held_out);
    EXPECT_TRUE(snapshot.ok()) << snapshot.status();
    if (!snapshot.ok() || snapshot->sums == nullptr) return nullptr;
    return std::make_shared<const engine::Statistics>(*snapshot->sums);
  }
  bool Exists(const CalibrationCalls& calibration) {
    return server_->calibrations().Find({}, calibration.id()).ok();
  }

  const Layer layer_ = MakeRandomLayer(3, 12, 700);
  Server server_{GetParam()};
};

TEST_P(CalibrationTest, RepeatsAreIgnoredAndGapsRefused) {
  const auto calibration = Create();
  StreamCall live(calibration, "s");
  ASSERT_TRUE(live.opened().ok());
  EXPECT_TRUE(live.Fold(0, Rows(0, 300)).ok());
  EXPECT_TRUE(live.Fold(0, Rows(0, 300)).ok());
  for (const int64_t sequence : {int64_t{2}, int64_t{-1}, std::numeric_limits<int64_t>::max()}) {
    const absl::Status gap = live.Fold(sequence, Rows(300, 700));
    EXPECT_TRUE(absl::IsInvalidArgument(gap)) << gap;
    EXPECT_CONTAINS(gap.message(), "expected 1");
  }
  EXPECT_TRUE(live.Fold(1, Rows(300, 700)).ok());
  EXPECT_TRUE(live.Fold(0, Rows(5, 6)).ok());
  const StreamView view = live.Look().first;
  EXPECT_EQ(view.received, 2);
  EXPECT_EQ(view.tokens, 700);
  EXPECT_EQ(view.durable, stays() ? 0 : 2);
  EXPECT_EQ(calibration.View().record.tokens(), 700);
  EXPECT_LT(Difference(*Export(calibration), GramOf(layer_)), 1e-6);
}

TEST_P(CalibrationTest, ARefusedChunkChangesNothing) {
  Layer broken = layer_;
  broken.x[static_cast<size_t>(500 * layer_.features + 3)] = std::nanf("");
  const auto calibration = Create({.held_out_fraction = 0.5, .sequence_rows = 10});
  StreamCall live(calibration, "s");
  ASSERT_TRUE(live.opened().ok());
  EXPECT_TRUE(live.Fold(0, Rows(0, 100)).ok());
  const auto refuse = [&](std::span<const std::byte> x, std::span<const std::byte> more) {
    const absl::Status refused = live.Fold(1, x, more);
    EXPECT_TRUE(absl::IsInvalidArgument(refused)) << refused;
    return std::string(refused.message());
  };
  const auto whole = RowBytes(broken.x, broken.features, 100, 700);
  EXPECT_CONTAINS(refuse(whole, {}), "500");
  EXPECT_CONTAINS(refuse(whole.first(7), {}), "whole rows");
  EXPECT_CONTAINS(refuse({}, {}), "at least one");
  const auto rows = RowBytes(layer_.x, layer_.features, 100, 110);
  EXPECT_CONTAINS(refuse(rows, rows), "matched");
  EXPECT_EQ(live.Look().first.received, 1);
  EXPECT_TRUE(live.Fold(1, Rows(100, 700)).ok());
  ASSERT_TRUE(calibration.Finalize(700).ok());
  const engine::HeldOutSplit split(0.5, 10, "s");
  EXPECT_LT(Difference(*Export(calibration),
                       GramOf(layer_, [&](int64_t row) { return !split.IsHeldOut(row); })),
            1e-6);
}

TEST_P(CalibrationTest, EachStreamIsSplitByItsName) {
  const auto calibration = Create({.held_out_fraction = 0.25, .sequence_rows = 16});
  std::vector<double> fit(static_cast<size_t>(layer_.features * layer_.features));
  std::vector<double> held_out = fit;
  int64_t held_out_tokens = 0;
  for (const std::string id : {"a", "b", "rank 3"}) {
    ASSERT_TRUE(SendRows(calibration, id, layer_, 37).ok());
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
  ASSERT_TRUE(calibration.Finalize(3 * layer_.tokens, {"a", "b", "rank 3"}).ok());
  const auto pin = calibration.Pin();
  ASSERT_TRUE(pin.ok());
  const auto sums = calibration.Sums();
  ASSERT_TRUE(sums.ok()) << sums.status();
  EXPECT_EQ(sums->held_out->tokens, held_out_tokens);
  EXPECT_EQ(sums->fit->tokens, 3 * layer_.tokens - held_out_tokens);
  EXPECT_EQ(calibration.View().record.held_out_tokens(), held_out_tokens);
  EXPECT_LT(Difference(*sums->fit, fit), 1e-6);
  EXPECT_LT(Difference(*sums->held_out, held_out), 1e-6);
}

TEST_P(CalibrationTest, ANewerCallTakesTheStreamOver) {
  const auto calibration = Create();
  Gate told;
  StreamCall older(calibration, "s", [&] { told.Open(); });
  ASSERT_TRUE(older.opened().ok());
  EXPECT_TRUE(older.Fold(0, Rows(0, 100)).ok());
  EXPECT_TRUE(older.Look().first.live);
  StreamCall newer(calibration, "s");
  ASSERT_TRUE(newer.opened().ok());
  EXPECT_TRUE(told.is_open());
  EXPECT_EQ(older.Look().second.code(), absl::StatusCode::kAborted);
  EXPECT_EQ(older.Fold(1, Rows(100, 200)).code(), absl::StatusCode::kAborted);
  // The older's end does not end the newer.
  older.Close();
  EXPECT_TRUE(newer.Look().first.live);
  EXPECT_EQ(newer.Look().first.received, 1);
  EXPECT_TRUE(newer.Fold(1, Rows(100, 700)).ok());
  newer.Close();
  ASSERT_TRUE(calibration.Finalize(700, {"s"}).ok());
}

TEST_P(CalibrationTest, FinalizeChecksWhatIsExpected) {
  const auto calibration = Create();
  EXPECT_CONTAINS(calibration.Finalize().message(), "no tokens");
  StreamCall live(calibration, "s");
  ASSERT_TRUE(live.opened().ok());
  EXPECT_CONTAINS(calibration.Finalize({}, {"s"}).message(), "sent nothing");
  EXPECT_TRUE(live.Fold(0, Rows(0, 700)).ok());
  EXPECT_CONTAINS(calibration.Finalize({}, {"s"}).message(), "open call");
  EXPECT_CONTAINS(calibration.Finalize({}, {"other"}).message(), "sent nothing");
  EXPECT_CONTAINS(calibration.Finalize(699).message(), "there are 700");
  EXPECT_TRUE(absl::IsFailedPrecondition(calibration.Finalize(699)));
  EXPECT_TRUE(absl::IsFailedPrecondition(calibration.Pin().status()));

  // Who is not expected to have ended is ended.
  EXPECT_TRUE(calibration.Finalize(700).ok());
  EXPECT_TRUE(absl::IsFailedPrecondition(live.Look().second));
  EXPECT_FALSE(live.Fold(1, Rows(0, 1)).ok());
  live.Close();
  EXPECT_TRUE(calibration.Finalize(700, {"s"}).ok());
  EXPECT_TRUE(absl::IsFailedPrecondition(calibration.Finalize(1)));
  EXPECT_TRUE(absl::IsFailedPrecondition(SendRows(calibration, "late", layer_, 100)));
}

TEST_P(CalibrationTest, ImportAddsOnce) {
  const auto calibration = Create({.held_out_fraction = 0.5, .sequence_rows = 10});
  const auto source = Create();
  ASSERT_TRUE(SendRows(source, "s", layer_, 100).ok());
  const engine::SharedStatistics sums = Export(source);
  const auto import = [&](const CalibrationCalls& to, const std::string& id, bool held_out) {
    return to.Import(id, held_out, *sums);
  };
  EXPECT_EQ(import(calibration, "i", false).value(), false);
  EXPECT_EQ(import(calibration, "i", false).value(), true);
  EXPECT_EQ(import(calibration, "j", true).value(), false);
  ASSERT_TRUE(SendRows(calibration, "stream", layer_, 100).ok());
  EXPECT_TRUE(absl::IsFailedPrecondition(import(calibration, "stream", false).status()));
  EXPECT_TRUE(absl::IsFailedPrecondition(SendRows(calibration, "i", layer_, 100)));
  EXPECT_TRUE(absl::IsFailedPrecondition(import(source, "k", true).status()));
  ASSERT_TRUE(calibration.Finalize(3 * layer_.tokens, {"i", "j", "stream"}).ok());
  EXPECT_EQ(import(calibration, "i", false).value(), true);
  EXPECT_TRUE(absl::IsFailedPrecondition(import(calibration, "new", false).status()));
  for (const StreamView& stream : calibration.View().streams) {
    EXPECT_EQ(stream.imported, stream.id != "stream");
    EXPECT_EQ(stream.tokens, layer_.tokens);
    EXPECT_EQ(stream.durable, stream.received);
  }
}

TEST_P(CalibrationTest, AnExportIsOfOneMoment) {
  const auto calibration = Create();
  StreamCall live(calibration, "s");
  ASSERT_TRUE(live.opened().ok());
  const int64_t before = server_->memory().reserved();
  EXPECT_TRUE(live.Fold(0, Rows(0, 333)).ok());
  auto snapshot = calibration.Export(false);
  ASSERT_TRUE(snapshot.ok()) << snapshot.status();
  EXPECT_GT(server_->memory().reserved(), before);
  EXPECT_TRUE(live.Fold(1, Rows(333, 700)).ok());
  EXPECT_EQ(snapshot->sums->tokens, 333);
  EXPECT_LT(Difference(*snapshot->sums, GramOf(layer_, [](int64_t row) { return row < 333; })),
            1e-6);
  snapshot = absl::UnknownError("given back");
  EXPECT_EQ(server_->memory().reserved(), before);
  EXPECT_EQ(Export(calibration, true), nullptr);
  ASSERT_TRUE(calibration.Finalize().ok());
  EXPECT_EQ(Export(calibration)->tokens, 700);
}

TEST_P(CalibrationTest, PinnedOnesStay) {
  // Its time is over from the start.
  const CalibrationCalls calibration(server_, Calibrate(server_, layer_, {.ttl_micros = 0}));
  ASSERT_NE(calibration.id(), "");
  const auto tick = [&] {
    server_->calibrations().Tick({});
    Settle(*server_);
  };
  {
    auto pin = calibration.Pin();
    ASSERT_TRUE(pin.ok());
    EXPECT_EQ(calibration.View().jobs, 1);
    EXPECT_TRUE(absl::IsFailedPrecondition(calibration.Remove()));
    tick();
    EXPECT_TRUE(Exists(calibration));
  }
  EXPECT_EQ(calibration.View().jobs, 0);
  tick();
  EXPECT_FALSE(Exists(calibration));
  EXPECT_TRUE(absl::IsNotFound(calibration.Remove()));
  EXPECT_TRUE(absl::IsNotFound(calibration.Pin().status()));
  EXPECT_TRUE(absl::IsNotFound(SendRows(calibration, "s", layer_, 100)));
  EXPECT_EQ(server_->memory().reserved(), 0);
}

TEST_P(CalibrationTest, RemovedOnesGiveEverythingBack) {
  const CalibrationCalls finalized(server_, Calibrate(server_, layer_));
  const CalibrationCalls open = Create({.held_out_fraction = 0.1});
  StreamCall live(open, "s");
  EXPECT_TRUE(live.Fold(0, Rows(0, 100)).ok());
  for (const CalibrationCalls& calibration : {finalized, open}) {
    EXPECT_TRUE(absl::IsNotFound(CalibrationCalls(server_, calibration.id(), "other").Remove()));
    EXPECT_TRUE(calibration.Remove().ok());
    EXPECT_TRUE(absl::IsNotFound(calibration.Remove()));
  }
  EXPECT_TRUE(absl::IsNotFound(live.Look().second));
  EXPECT_TRUE(absl::IsNotFound(live.Fold(1, Rows(100, 200))));
  EXPECT_EQ(server_->memory().reserved(), 0);
}

TEST_P(CalibrationTest, ExpiresAfterItsLastCallAndItsTime) {
  const auto calibration = Create({.ttl_micros = 3'600'000'000});
  StreamCall live(calibration, "s");
  ASSERT_TRUE(live.opened().ok());
  const base::UnixMicros end = ExpireTime(calibration.View().record);
  const std::shared_ptr<PartialSums> sums = calibration.Partial().value();
  EXPECT_TRUE(sums->InUse(end));
  live.Close();
  EXPECT_TRUE(sums->InUse(end - 1));
  EXPECT_FALSE(sums->InUse(end));
  const auto gone = Create({.ttl_micros = 0});
  const auto filled = Create({.ttl_micros = 0});
  StreamCall filling(filled, "s");
  server_->calibrations().Tick({});
  Settle(*server_);
  EXPECT_FALSE(Exists(gone));
  EXPECT_TRUE(Exists(calibration));
  // Time is not over while a call is open.
  EXPECT_TRUE(Exists(filled));
  filling.Close();
  server_->calibrations().Tick({});
  Settle(*server_);
  EXPECT_FALSE(Exists(filled));
}

// Rows that came since the last commit put the end off, though the catalog does not know of them.
TEST_P(CalibrationTest, RowsKeepItAlive) {
  const auto calibration = Create({.ttl_micros = 300'000});
  const base::UnixMicros first = ExpireTime(calibration.View().record);
  while (base::Now() <= first) {
    StreamCall live(calibration, "s");
    EXPECT_TRUE(live.Fold(live.Look().first.received, Rows(0, 1)).ok());
    live.Close();
    server_->calibrations().Tick({});
    Settle(*server_);
    ASSERT_TRUE(Exists(calibration));
    std::this_thread::yield();
  }
}

TEST_P(CalibrationTest, ListsAndLabels) {
  const auto labelled = Create({.labels = {"a", "b"}});
  const auto plain = Create();
  const auto ids = [&](const std::string& tenant, const std::string& label) {
    std::set<std::string> found;
    PageRequest page{.size = 1, .after = {}};
    for (;;) {
      std::string next;
      const auto views = server_->calibrations().List({tenant, {}}, label, page, next);
      EXPECT_TRUE(views.ok()) << views.status();
      for (const CalibrationView& view : *views) found.insert(view.record.id());
      if (next.empty()) return found;
      page = ReadPageRequest(1, next).value();
    }
  };
  EXPECT_EQ(ids("", ""), (std::set{labelled.id(), plain.id()}));
  EXPECT_EQ(ids("", "b"), std::set{labelled.id()});
  EXPECT_TRUE(ids("", "c").empty());
  EXPECT_TRUE(ids("other", "").empty());
}

INSTANTIATE_TEST_SUITE_P(Stores, CalibrationTest,
                         ::testing::Values(StoreKind::kMemory, StoreKind::kSqlite),
                         [](const auto& about) { return NameOf(about.param); });

}  // namespace
}  // namespace certiq::server::testing
