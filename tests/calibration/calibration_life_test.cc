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
#include "support/backend_examples.h"
#include "support/gate.h"

namespace certiq::server::testing {
namespace {

using certiq::testing::Gate;
using certiq::testing::Layer;
using certiq::testing::MakeRandomLayer;
using certiq::testing::RowBytes;

constexpr int64_t kChunk = 50;

absl::Status Commit(Calibration& calibration) {
  return InStrand(calibration, [&] { return calibration.Commit(); });
}

absl::Status Finalize(Calibration& calibration, std::optional<int64_t> tokens = {}) {
  return InStrand(calibration, [&] { return calibration.Finalize(tokens, {}); });
}

int64_t Durable(const Calibration& calibration) {
  int64_t durable = 0;
  for (const StreamView& stream : calibration.View(true).streams) durable += stream.durable;
  return durable;
}

class CalibrationLifeTest : public ::testing::TestWithParam<StoreKind> {
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
  std::shared_ptr<Calibration> Find(const std::string& id) {
    auto found = server_->calibrations().Find({}, id);
    EXPECT_TRUE(found.ok()) << found.status();
    return found.value_or(nullptr);
  }
  // Sends rows [begin, end) as chunk `sequence` of a call of its own.
  absl::Status SendChunk(Calibration& calibration, const std::string& id, int64_t sequence,
                         int64_t begin, int64_t end) {
    const auto live = NewStream(id);
    const auto bytes = RowBytes(layer_.x, layer_.features, begin, end);
    absl::Status sent = InStrand(calibration, [&] { return calibration.Open(live); });
    if (sent.ok()) {
      sent = InStrand(calibration, [&] { return calibration.Fold(*live, sequence, bytes, {}); });
    }
    calibration.Close(*live);
    return sent;
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
      const auto live = NewStream(absl::StrCat("stream ", s), [&] { ++told; });
      ASSERT_TRUE(InStrand(*calibration, [&] { return calibration->Open(live); }).ok());
      Gate all;
      std::atomic<int64_t> left{layer_.tokens / kChunk};
      for (int64_t sequence = 0; sequence < layer_.tokens / kChunk; ++sequence) {
        const auto bytes =
            RowBytes(layer_.x, layer_.features, sequence * kChunk, (sequence + 1) * kChunk);
        ASSERT_TRUE(
            calibration->strand()
                .Post({.run = [&calibration, live, sequence,
                               bytes] { return calibration->Fold(*live, sequence, bytes, {}); },
                       .done =
                           [&](const absl::Status& status) {
                             EXPECT_TRUE(status.ok()) << status;
                             if (--left == 0) all.Open();
                           }})
                .ok());
        const auto [view, ended] = calibration->Look(*live);
        EXPECT_TRUE(ended.ok());
        EXPECT_LE(view.durable, view.received);
      }
      EXPECT_TRUE(all.Wait());
      EXPECT_TRUE(Commit(*calibration).ok());
      EXPECT_EQ(calibration->Look(*live).first.durable, layer_.tokens / kChunk);
      live->changed.Detach();
      calibration->Close(*live);
    });
  }
  std::atomic<bool> over{false};
  std::thread watcher([&] {
    while (!over) {
      server_->calibrations().Tick(std::chrono::steady_clock::time_point::max());
      EXPECT_TRUE(server_->calibrations().List({}, "", 10, "").ok());
      static_cast<void>(
          InStrand(*calibration, [&] { return calibration->Export(false).status(); }));
      static_cast<void>(calibration->PinFinalized());
      std::this_thread::yield();
    }
  });
  for (std::thread& thread : threads) thread.join();
  over = true;
  watcher.join();

  ASSERT_TRUE(Finalize(*calibration, kStreams * layer_.tokens).ok());
  std::vector<double> fit(static_cast<size_t>(layer_.features * layer_.features));
  for (int s = 0; s < kStreams; ++s) {
    const engine::HeldOutSplit split(0.2, 32, absl::StrCat("stream ", s));
    const auto gram = GramOf(layer_, [&](int64_t row) { return !split.IsHeldOut(row); });
    for (size_t i = 0; i < fit.size(); ++i) fit[i] += gram[i];
  }
  const auto pin = calibration->PinFinalized();
  ASSERT_TRUE(pin.ok());
  // Many ask for the same sums.
  threads.clear();
  for (int t = 0; t < 3; ++t) {
    threads.emplace_back([&] {
      const auto sums = calibration->Sums();
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
        const absl::Status sent = SendRows(*calibration, absl::StrCat(s), layer_, kChunk);
        EXPECT_TRUE(sent.ok() || absl::IsNotFound(sent)) << sent;
      });
    }
    EXPECT_TRUE(
        InStrand(*calibration, [&] { return server_->calibrations().Remove(calibration); }).ok());
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
      for (;;) {
        const auto made = server_->calibrations().Create(
            {}, Wanted{.request_id = "r", .digest = "d", .features = layer_.features}.request());
        if (absl::IsUnavailable(made.status())) continue;
        ASSERT_TRUE(made.ok()) << made.status();
        ids[t] = (*made)->id();
        return;
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
  for (const std::string& id : ids) EXPECT_EQ(id, ids[0]);
  const auto create = [&](const std::string& tenant, const std::string& digest) {
    return server_->calibrations().Create(
        {tenant, {}},
        Wanted{.request_id = "r", .digest = digest, .features = layer_.features}.request());
  };
  EXPECT_TRUE(absl::IsAlreadyExists(create("", "other").status()));
  EXPECT_NE((*create("tenant", "d"))->id(), ids[0]);
  if (GetParam() == StoreKind::kMemory) return;
  server_.Restart();
  EXPECT_EQ((*create("", "d"))->id(), ids[0]);
  EXPECT_TRUE(absl::IsAlreadyExists(create("", "other").status()));
}

TEST_P(CalibrationLifeTest, WhatIsCommittedSurvives) {
  if (GetParam() == StoreKind::kMemory) return;  // Nothing survives.
  std::string id;
  {
    const auto calibration = Create({.held_out_fraction = 0.3, .sequence_rows = 7});
    id = calibration->id();
    ASSERT_TRUE(SendChunk(*calibration, "s", 0, 0, 200).ok());
    EXPECT_EQ(Durable(*calibration), 0);
    ASSERT_TRUE(Commit(*calibration).ok());
    EXPECT_EQ(Durable(*calibration), 1);
    ASSERT_TRUE(SendChunk(*calibration, "s", 1, 200, 300).ok());
    ASSERT_TRUE(SendChunk(*calibration, "t", 0, 0, 300).ok());
  }
  server_.Restart();
  {
    const auto calibration = Find(id);
    ASSERT_EQ(calibration->View(true).streams.size(), 1U);
    EXPECT_EQ(calibration->View(true).streams[0].received, 1);
    // Sent again from what was durable on.
    ASSERT_TRUE(SendChunk(*calibration, "s", 1, 200, 600).ok());
    ASSERT_TRUE(Commit(*calibration).ok());
  }
  server_.Restart();
  std::string sha256;
  {
    const auto calibration = Find(id);
    ASSERT_TRUE(Finalize(*calibration, 600).ok());
    sha256 = calibration->View(false).record.sums_sha256;
    EXPECT_EQ(sha256.size(), 64U);
  }
  server_.Restart();
  const auto calibration = Find(id);
  EXPECT_EQ(calibration->View(false).record.sums_sha256, sha256);
  const auto pin = calibration->PinFinalized();
  ASSERT_TRUE(pin.ok());
  const auto sums = calibration->Sums();
  ASSERT_TRUE(sums.ok()) << sums.status();
  EXPECT_EQ(sums->sha256, sha256);
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
    insist([&] { return SendChunk(*calibration, "s", 0, 0, 300); });
    insist([&] { return Commit(*calibration); });
    EXPECT_EQ(Durable(*calibration), 1);
    insist([&] { return SendChunk(*calibration, "s", 1, 300, 600); });
    engine::Statistics more;
    more.gram = engine::UpperPanels<double>(layer_.features);
    more.tokens = 5;
    insist([&] {
      return InStrand(*calibration, [&] { return calibration->Import("i", false, more).status(); });
    });
    EXPECT_EQ(Durable(*calibration), 3);
    insist([&] { return Finalize(*calibration, 605); });
    {
      const auto pin = calibration->PinFinalized();
      ASSERT_TRUE(pin.ok());
      const auto sums = calibration->Sums();
      ASSERT_TRUE(sums.ok()) << sums.status();
      EXPECT_LT(Difference(*sums->fit, GramOf(layer_)), 1e-6);
    }
    insist([&] {
      return InStrand(*calibration, [&] { return server_->calibrations().Remove(calibration); });
    });
    if (server_.plan.writes <= server_.plan.fail_at) break;
  }
  server_.plan.Heal();
  EXPECT_EQ(server_->memory().reserved(), 0);
  EXPECT_TRUE(server_->calibrations().List({}, "", 10, "")->items.empty());
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

INSTANTIATE_TEST_SUITE_P(Stores, CalibrationLifeTest,
                         ::testing::Values(StoreKind::kMemory, StoreKind::kSqlite),
                         [](const auto& about) { return NameOf(about.param); });

}  // namespace
}  // namespace certiq::server::testing
