// Calibrations over restarts, on stores that fail, and under many threads.

#include <gtest/gtest.h>

#include <atomic>
#include <memory>
#include <optional>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "base/status_macros.h"
#include "engine/gram/held_out_split.h"
#include "support/backend_examples.h"
#include "support/gate.h"

namespace certiq::server::testing {
namespace {

using certiq::testing::Gate;
using certiq::testing::Layer;
using certiq::testing::MakeRandomLayer;
using certiq::testing::RowBytes;

constexpr int64_t kChunk = 50;

int64_t Durable(const CalibrationCalls& calibration) {
  int64_t durable = 0;
  for (const StreamView& stream : calibration.View().streams) durable += stream.durable;
  return durable;
}

class CalibrationLifeTest : public ::testing::TestWithParam<StoreKind> {
 protected:
  void SetUp() override {
    server_.Start();
    ASSERT_FALSE(HasFatalFailure());
    // The claim that follows the start is a write too.
    Settle(*server_);
  }
  CalibrationCalls Create(Wanted wanted = {}) {
    wanted.features = layer_.features;
    auto made = server_->calibrations().Create({}, wanted.request());
    EXPECT_TRUE(made.ok()) << made.status();
    return CalibrationCalls(server_, made.ok() ? made->record.id() : "");
  }
  // Sends rows [begin, end) as chunk `sequence` of a call of its own.
  absl::Status SendChunk(const CalibrationCalls& calibration, const std::string& id,
                         int64_t sequence, int64_t begin, int64_t end) {
    StreamCall live(calibration, id);
    RETURN_IF_ERROR(live.opened());
    return live.Fold(sequence, RowBytes(layer_.x, layer_.features, begin, end));
  }

  const Layer layer_ = MakeRandomLayer(3, 20, 600);
  Server server_{GetParam()};
};

// Streams from several threads, chunks in flight, looks and commits between them.
TEST_P(CalibrationLifeTest, StreamsFoldSideBySide) {
  constexpr int kStreams = 4;
  const auto calibration = Create({.held_out_fraction = 0.2, .sequence_rows = 32});
  std::vector<std::thread> threads;
  threads.reserve(kStreams + 1);
  for (int s = 0; s < kStreams; ++s) {
    threads.emplace_back([&, s] {
      std::atomic<int> told{0};
      StreamCall live(calibration, absl::StrCat("stream ", s), [&] { ++told; });
      ASSERT_TRUE(live.opened().ok());
      Gate all;
      std::atomic<int64_t> left{layer_.tokens / kChunk};
      for (int64_t sequence = 0; sequence < layer_.tokens / kChunk; ++sequence) {
        const auto bytes =
            RowBytes(layer_.x, layer_.features, sequence * kChunk, (sequence + 1) * kChunk);
        ASSERT_TRUE(live.PostFold(sequence, bytes,
                                  [&](const absl::Status& status) {
                                    EXPECT_TRUE(status.ok()) << status;
                                    if (--left == 0) all.Open();
                                  })
                        .ok());
        const auto [view, ended] = live.Look();
        EXPECT_TRUE(ended.ok());
        EXPECT_LE(view.durable, view.received);
      }
      EXPECT_TRUE(all.Wait());
      EXPECT_TRUE(calibration.Commit().ok());
      EXPECT_EQ(live.Look().first.durable, layer_.tokens / kChunk);
      live.Detach();
      live.Close();
    });
  }
  std::atomic<bool> over{false};
  std::thread watcher([&] {
    while (!over) {
      server_->calibrations().Tick(std::chrono::steady_clock::time_point::max());
      std::string next;
      EXPECT_TRUE(server_->calibrations().List({}, "", {.size = 10, .after = {}}, next).ok());
      static_cast<void>(calibration.Export(false));
      static_cast<void>(calibration.Pin());
      calibration.View();
      std::this_thread::yield();
    }
  });
  for (std::thread& thread : threads) thread.join();
  over = true;
  watcher.join();

  ASSERT_TRUE(calibration.Finalize(kStreams * layer_.tokens).ok());
  std::vector<double> fit(static_cast<size_t>(layer_.features * layer_.features));
  for (int s = 0; s < kStreams; ++s) {
    const engine::HeldOutSplit split(0.2, 32, absl::StrCat("stream ", s));
    const auto gram = GramOf(layer_, [&](int64_t row) { return !split.IsHeldOut(row); });
    for (size_t i = 0; i < fit.size(); ++i) fit[i] += gram[i];
  }
  const auto pin = calibration.Pin();
  ASSERT_TRUE(pin.ok());
  // Many ask for the same sums.
  threads.clear();
  for (int t = 0; t < 3; ++t) {
    threads.emplace_back([&] {
      const auto sums = calibration.Sums();
      ASSERT_TRUE(sums.ok()) << sums.status();
      EXPECT_LT(Difference(*sums->fit, fit), 1e-6);
    });
  }
  for (std::thread& thread : threads) thread.join();
}

TEST_P(CalibrationLifeTest, RemoveWhileStreamsSend) {
  for (int round = 0; round < 5; ++round) {
    const auto calibration = Create();
    std::vector<std::thread> threads;
    threads.reserve(2);
    for (int s = 0; s < 2; ++s) {
      threads.emplace_back([&, s] {
        const absl::Status sent = SendRows(calibration, absl::StrCat(s), layer_, kChunk);
        EXPECT_TRUE(sent.ok() || absl::IsNotFound(sent)) << sent;
      });
    }
    EXPECT_TRUE(calibration.Remove().ok());
    for (std::thread& thread : threads) thread.join();
  }
  EXPECT_EQ(server_->memory().reserved(), 0);
}

TEST_P(CalibrationLifeTest, OneRequestMakesOneCalibration) {
  std::vector<std::thread> threads;
  std::vector<std::string> ids(4);
  threads.reserve(ids.size());
  for (size_t t = 0; t < ids.size(); ++t) {
    threads.emplace_back([&, t] {
      const auto made = server_->calibrations().Create(
          {}, Wanted{.request_id = "r", .digest = "d", .features = layer_.features}.request());
      ASSERT_TRUE(made.ok()) << made.status();
      ids[t] = made->record.id();
      // Whoever made it, all send into the same sums.
      EXPECT_TRUE(SendChunk(CalibrationCalls(server_, ids[t]), absl::StrCat(t), 0, 0, 100).ok());
    });
  }
  for (std::thread& thread : threads) thread.join();
  for (const std::string& id : ids) EXPECT_EQ(id, ids[0]);
  const CalibrationView view = CalibrationCalls(server_, ids[0]).View();
  EXPECT_EQ(view.record.tokens(), 400);
  EXPECT_EQ(view.streams.size(), ids.size());
  const auto create = [&](const std::string& tenant, const std::string& digest) {
    return server_->calibrations().Create(
        {tenant, {}},
        Wanted{.request_id = "r", .digest = digest, .features = layer_.features}.request());
  };
  EXPECT_TRUE(absl::IsAlreadyExists(create("", "other").status()));
  EXPECT_NE(create("tenant", "d")->record.id(), ids[0]);
  if (GetParam() == StoreKind::kMemory) return;
  server_.Restart();
  EXPECT_EQ(create("", "d")->record.id(), ids[0]);
  EXPECT_TRUE(absl::IsAlreadyExists(create("", "other").status()));
}

TEST_P(CalibrationLifeTest, WhatIsCommittedSurvives) {
  if (GetParam() == StoreKind::kMemory) return;  // Nothing survives.
  const auto calibration = Create({.held_out_fraction = 0.3, .sequence_rows = 7});
  ASSERT_TRUE(SendChunk(calibration, "s", 0, 0, 200).ok());
  EXPECT_EQ(Durable(calibration), 0);
  ASSERT_TRUE(calibration.Commit().ok());
  EXPECT_EQ(Durable(calibration), 1);
  ASSERT_TRUE(SendChunk(calibration, "s", 1, 200, 300).ok());
  ASSERT_TRUE(SendChunk(calibration, "t", 0, 0, 300).ok());
  server_.Restart();
  ASSERT_EQ(calibration.View().streams.size(), 1U);
  EXPECT_EQ(calibration.View().streams[0].received, 1);
  // Sent again from what was durable on.
  ASSERT_TRUE(SendChunk(calibration, "s", 1, 200, 600).ok());
  ASSERT_TRUE(calibration.Commit().ok());
  server_.Restart();
  ASSERT_TRUE(calibration.Finalize(600).ok());
  const std::string sha256 = calibration.View().record.sums_sha256();
  EXPECT_EQ(sha256.size(), 64U);
  server_.Restart();
  EXPECT_EQ(calibration.View().record.sums_sha256(), sha256);
  const auto pin = calibration.Pin();
  ASSERT_TRUE(pin.ok());
  EXPECT_EQ(pin->record().sums_sha256(), sha256);
  const auto sums = calibration.Sums();
  ASSERT_TRUE(sums.ok()) << sums.status();
  const engine::HeldOutSplit split(0.3, 7, "s");
  EXPECT_LT(
      Difference(*sums->fit, GramOf(layer_, [&](int64_t row) { return !split.IsHeldOut(row); })),
      1e-6);
  EXPECT_LT(Difference(*sums->held_out,
                       GramOf(layer_, [&](int64_t row) { return split.IsHeldOut(row); })),
            1e-6);
}

// Every write of a life fails once: what was asked for is asked for again, and nothing is lost.
TEST_P(CalibrationLifeTest, AFailingStoreLosesNothing) {
  for (int64_t failing = 0;; ++failing) {
    ASSERT_LT(failing, 50);
    SCOPED_TRACE(failing);
    server_.plan.Heal();
    const auto calibration = Create();
    server_.plan.fail_at = server_.plan.writes + failing;
    const auto insist = [&](const auto& work) {
      absl::Status status = work();
      if (!status.ok()) {
        EXPECT_TRUE(absl::IsUnavailable(status)) << status;
        status = work();
      }
      EXPECT_TRUE(status.ok()) << status;
    };
    insist([&] { return SendChunk(calibration, "s", 0, 0, 300); });
    insist([&] { return calibration.Commit(); });
    EXPECT_EQ(Durable(calibration), 1);
    insist([&] { return SendChunk(calibration, "s", 1, 300, 600); });
    engine::Statistics more;
    more.gram = engine::UpperTriangle<double>(layer_.features);
    more.tokens = 5;
    insist([&] { return calibration.Import("i", false, more).status(); });
    EXPECT_EQ(Durable(calibration), 3);
    insist([&] { return calibration.Finalize(605); });
    {
      const auto pin = calibration.Pin();
      ASSERT_TRUE(pin.ok());
      const auto sums = calibration.Sums();
      ASSERT_TRUE(sums.ok()) << sums.status();
      EXPECT_LT(Difference(*sums->fit, GramOf(layer_)), 1e-6);
    }
    insist([&] { return calibration.Remove(); });
    if (server_.plan.writes <= server_.plan.fail_at) break;
  }
  server_.plan.Heal();
  EXPECT_EQ(server_->memory().reserved(), 0);
  std::string next;
  EXPECT_TRUE(server_->calibrations().List({}, "", {.size = 10, .after = {}}, next)->empty());
}

TEST_P(CalibrationLifeTest, WhatIsRefusedLeavesNothing) {
  const int64_t reserved = server_->memory().reserved();
  server_.plan.FailFrom(1);
  EXPECT_TRUE(
      absl::IsUnavailable(server_->calibrations()
                              .Create({}, Wanted{.request_id = "r", .features = 20}.request())
                              .status()));
  EXPECT_EQ(server_->memory().reserved(), reserved);
  EXPECT_TRUE(
      server_->calibrations().Create({}, Wanted{.request_id = "r", .features = 20}.request()).ok());
  const auto large = server_->calibrations().Create({"t", {.memory_bytes = 1000}},
                                                    Wanted{.features = 20}.request());
  EXPECT_TRUE(absl::IsResourceExhausted(large.status()));
  for (const Wanted& bad :
       {Wanted{.features = 0}, Wanted{.features = int64_t{1} << 40},
        Wanted{.features = 1, .held_out_fraction = 0.51},
        Wanted{.features = 1, .sequence_rows = -1}, Wanted{.features = 1, .labels = {""}}}) {
    EXPECT_TRUE(
        absl::IsInvalidArgument(server_->calibrations().Create({}, bad.request()).status()));
  }
}

// No call has opened a stream since the restart.
TEST_P(CalibrationLifeTest, OpenOnesExpireAfterARestart) {
  if (GetParam() == StoreKind::kMemory) return;  // Nothing survives.
  const auto calibration = Create({.ttl_micros = 0});
  const auto other = Create();
  server_.Restart();
  server_->calibrations().Tick({});
  Settle(*server_);
  EXPECT_TRUE(absl::IsNotFound(calibration.Finalize()));
  EXPECT_TRUE(other.Partial().ok());
  EXPECT_EQ(server_->memory().reserved(), 0);
}

// A calibration is seen from the moment it is in the catalog on: streams that open at once go into
// the sums that its creation pays for.
TEST_P(CalibrationLifeTest, WhatIsCreatedIsFilledAtOnce) {
  for (int round = 0; round < 10; ++round) {
    std::atomic<bool> over{false};
    std::thread filler([&] {
      while (!over) {
        std::string next;
        const auto found = server_->calibrations().List({}, "new", {.size = 10, .after = {}}, next);
        if (!found.ok() || found->empty()) continue;
        EXPECT_TRUE(
            SendChunk(CalibrationCalls(server_, found->front().record.id()), "s", 0, 0, 100).ok());
        return;
      }
    });
    const auto calibration = Create({.labels = {"new"}});
    filler.join();
    over = true;
    EXPECT_EQ(calibration.View().record.tokens(), 100);
    EXPECT_TRUE(calibration.Finalize(100, {"s"}).ok());
    EXPECT_TRUE(calibration.Remove().ok());
  }
  EXPECT_EQ(server_->memory().reserved(), 0);
}

// One of them is first; nothing is left either way.
TEST_P(CalibrationLifeTest, FinalizeAndRemoveAtOnce) {
  for (int round = 0; round < 10; ++round) {
    const auto calibration = Create();
    ASSERT_TRUE(SendChunk(calibration, "s", 0, 0, 600).ok());
    std::thread finalizer([&] {
      const absl::Status finalized = calibration.Finalize();
      EXPECT_TRUE(finalized.ok() || absl::IsNotFound(finalized)) << finalized;
    });
    EXPECT_TRUE(calibration.Remove().ok());
    finalizer.join();
    EXPECT_TRUE(absl::IsNotFound(calibration.Remove()));
  }
  // What the cache kept of sums that were gone already goes when others need the room.
  ByteBudget& memory = server_->memory();
  EXPECT_TRUE(memory.TryReserve(memory.capacity(), "everything").ok());
}

INSTANTIATE_TEST_SUITE_P(Stores, CalibrationLifeTest,
                         ::testing::Values(StoreKind::kMemory, StoreKind::kSqlite),
                         [](const auto& about) { return NameOf(about.param); });

}  // namespace
}  // namespace certiq::server::testing
