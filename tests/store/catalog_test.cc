// What every catalog does, and what outlives one that is durable.

#include "store/catalog.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <limits>
#include <map>
#include <memory>
#include <optional>
#include <set>
#include <string>
#include <thread>
#include <tuple>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "base/status.h"
#include "store/storage.h"
#include "store/store_examples.h"

namespace certiq::server::testing {
namespace {

constexpr base::UnixMicros kNow = 5'000'000;

struct InMemory {
  static constexpr bool kDurable = false;
};
struct OnDisk {
  static constexpr bool kDurable = true;
};

template <typename Kind>
class CatalogTest : public ::testing::Test {
 protected:
  void SetUp() override { Reopen(); }

  // As if the server had ended and started again; a catalog in memory stays.
  void Reopen() {
    if (Kind::kDurable || !storage_.has_value()) {
      storage_.reset();
      auto opened = OpenStorage(Kind::kDurable ? directory_.data() : "");
      ASSERT_TRUE(opened.ok()) << opened.status();
      storage_.emplace(*std::move(opened));
    }
    auto state = RegisterReplica(catalog(), "us", kNow);
    ASSERT_TRUE(state.ok()) << state.status();
    state_ = *std::move(state);
  }

  Catalog& catalog() { return *storage_->catalog; }

  // What a job needs: "calibration" of the examples' tenant, finalized.
  void AddFinalized() {
    ASSERT_TRUE(catalog().AddCalibration(FullCalibration("calibration")).ok());
  }

  JobRecord MustAdd(const JobRecord& job) {
    const auto added = catalog().AddJob(job);
    EXPECT_TRUE(added.ok()) << added.status();
    if (!added.ok()) return job;
    EXPECT_TRUE(added->changed);
    EXPECT_EQ(added->before, v1::JOB_STATE_UNSPECIFIED);
    return added->job;
  }
  JobRecord MustAdd(const std::string& id) { return MustAdd(QueuedJob(id)); }

  // Adds a job and claims it, which is the only one that waits.
  JobRecord MustClaim(const std::string& id) {
    MustAdd(id);
    const auto claimed = catalog().ClaimJob("us", absl::StrCat("claim of ", id), {});
    EXPECT_TRUE(claimed.ok()) << claimed.status();
    EXPECT_TRUE(claimed.ok() && claimed->has_value() && (*claimed)->id() == id);
    return claimed.ok() && claimed->has_value() ? **claimed : JobRecord();
  }
  JobRecord MustStart(const std::string& id) {
    const JobRecord job = MustClaim(id);
    const auto started = catalog().StartJob(id, job.claim(), kNow);
    EXPECT_TRUE(started.ok()) << started.status();
    return started.ok() ? started->job : job;
  }
  JobRecord MustFinish(const std::string& id, const absl::Status& status) {
    const JobRecord job = MustStart(id);
    const auto finished = catalog().FinishJob(
        id, job.claim(), {.status = status, .result = std::nullopt, .end_time = kNow});
    EXPECT_TRUE(finished.ok()) << finished.status();
    return finished.ok() ? finished->job : job;
  }

  // The stored record.
  JobRecord Stored(const std::string& id) {
    const auto found = catalog().FindJob(tenant_, id);
    EXPECT_TRUE(found.ok()) << id << ": " << found.status();
    return found.value_or(JobRecord());
  }
  CalibrationRecord StoredCalibration(const std::string& id) {
    const auto found = catalog().FindCalibration(tenant_, id);
    EXPECT_TRUE(found.ok()) << id << ": " << found.status();
    return found.value_or(CalibrationRecord());
  }

  const std::string tenant_ = QueuedJob("j").tenant();
  TemporaryDirectory directory_;
  std::optional<Storage> storage_;
  StoredState state_;
};

struct KindNames {
  template <typename Kind>
  static std::string GetName(int) {
    return Kind::kDurable ? "OnDisk" : "InMemory";
  }
};
using Kinds = ::testing::Types<InMemory, OnDisk>;
TYPED_TEST_SUITE(CatalogTest, Kinds, KindNames);

template <typename Record>
std::vector<std::string> Ids(const absl::StatusOr<std::vector<Record>>& records) {
  EXPECT_TRUE(records.ok()) << records.status();
  std::vector<std::string> ids;
  if (records.ok()) {
    for (const Record& record : *records) ids.push_back(record.id());
  }
  return ids;
}

std::vector<std::string> Sorted(std::vector<std::string> ids) {
  std::sort(ids.begin(), ids.end());
  return ids;
}

// The ids on all pages of so many, in turn.
template <typename Page>
std::vector<std::string> AllPages(int64_t size, Page page) {
  std::vector<std::string> ids;
  std::optional<PageKey> after;
  for (int pages = 0; pages < 1000; ++pages) {
    const auto records = page(after, size);
    EXPECT_TRUE(records.ok()) << records.status();
    if (!records.ok() || records->empty()) break;
    EXPECT_LE(static_cast<int64_t>(records->size()), size);
    for (const auto& record : *records) ids.push_back(record.id());
    after = PageKey(records->back().create_time(), records->back().id());
  }
  return ids;
}

using Strings = std::vector<std::string>;

TYPED_TEST(CatalogTest, StartsEmptyAndSaysWhetherItLasts) {
  EXPECT_EQ(this->catalog().durable(), TypeParam::kDurable);
  EXPECT_TRUE(this->catalog().settled());
  EXPECT_TRUE(this->state_.calibrations.empty());
  EXPECT_TRUE(this->state_.jobs.empty());
}

TYPED_TEST(CatalogTest, KeepsEveryField) {
  const CalibrationRecord calibration = FullCalibration(std::string("c'\0\xc3\xbf", 5));
  JobRecord job = FullJob(std::string("j\"\0\xc3\xbe", 5), 1);
  job.set_calibration_id(calibration.id());
  const auto added = this->catalog().AddCalibration(calibration);
  ASSERT_TRUE(added.ok()) << added.status();
  EXPECT_TRUE(Same(*added, calibration));
  EXPECT_TRUE(Same(this->MustAdd(job), job));
  EXPECT_TRUE(Same(this->StoredCalibration(calibration.id()), calibration));
  EXPECT_TRUE(Same(this->Stored(job.id()), job));
  this->Reopen();
  EXPECT_TRUE(Same(this->state_.calibrations, std::vector{calibration}));
  EXPECT_TRUE(Same(this->state_.jobs, std::vector{job}));
}

TYPED_TEST(CatalogTest, KeepsDefaults) {
  CalibrationRecord calibration;
  calibration.set_finalize_time(1);
  ASSERT_TRUE(this->catalog().AddCalibration(calibration).ok());
  JobRecord job = this->MustAdd(JobRecord());
  EXPECT_EQ(job.number(), 1);
  this->Reopen();
  EXPECT_TRUE(Same(this->state_.calibrations, std::vector{calibration}));
  EXPECT_TRUE(Same(this->state_.jobs, std::vector{job}));
  job.clear_number();
  EXPECT_TRUE(Same(job, JobRecord()));
}

TYPED_TEST(CatalogTest, KeepsUnusualNumbers) {
  using Limits = std::numeric_limits<double>;
  this->AddFinalized();
  std::vector<JobRecord> jobs;
  for (const double value : {Limits::max(), -Limits::min(), Limits::infinity(), -0.0,
                             0x1.fffffffffffffp-3, -Limits::quiet_NaN()}) {
    JobRecord job = FullJob(std::to_string(jobs.size()), 0);
    job.mutable_result()->set_relative_error(value);
    jobs.push_back(this->MustAdd(job));
  }
  this->Reopen();
  EXPECT_TRUE(Same(this->state_.jobs, jobs));
  EXPECT_TRUE(std::isnan(this->state_.jobs.back().result().relative_error()));
}

TYPED_TEST(CatalogTest, NumbersFollowTheOrderOfCreation) {
  this->AddFinalized();
  for (const char* id : {"c", "a", "b"}) this->MustAdd(FullJob(id, 77));
  EXPECT_TRUE(this->catalog().RemoveJob(this->tenant_, "a").ok());
  this->MustAdd("0");
  this->Reopen();
  Strings ids;
  int64_t last = 0;
  for (const JobRecord& job : this->state_.jobs) {
    ids.push_back(job.id());
    EXPECT_GT(job.number(), last);
    last = job.number();
  }
  EXPECT_EQ(ids, (Strings{"c", "b", "0"}));
}

TYPED_TEST(CatalogTest, AddCalibrationIsIdempotent) {
  Catalog& catalog = this->catalog();
  const CalibrationRecord first = OpenCalibration("c");
  ASSERT_TRUE(catalog.AddCalibration(first).ok());
  // The answer was lost.
  auto again = catalog.AddCalibration(first);
  ASSERT_TRUE(again.ok()) << again.status();
  EXPECT_TRUE(Same(*again, first));
  // Another call with the request's id.
  CalibrationRecord other = OpenCalibration("d");
  other.set_request_id(first.request_id());
  other.set_request_digest("other digest");
  again = catalog.AddCalibration(other);
  ASSERT_TRUE(again.ok()) << again.status();
  EXPECT_TRUE(Same(*again, first));
  // The same id of another tenant's request, and calls without one, are others.
  other.set_tenant("bob");
  EXPECT_EQ(catalog.AddCalibration(other)->id(), "d");
  for (const char* id : {"e", "f"}) {
    CalibrationRecord without = OpenCalibration(id);
    without.clear_request_id();
    EXPECT_EQ(catalog.AddCalibration(without)->id(), id);
  }
  EXPECT_EQ(catalog.FindCalibrationOfRequest(this->tenant_, first.request_id()).value()->id(), "c");
  EXPECT_EQ(catalog.FindCalibrationOfRequest("bob", first.request_id()).value()->id(), "d");
  EXPECT_FALSE(catalog.FindCalibrationOfRequest("bob", "never").value().has_value());
  this->Reopen();
  EXPECT_EQ(this->state_.calibrations.size(), 4u);
}

TYPED_TEST(CatalogTest, AddJobIsIdempotent) {
  this->AddFinalized();
  Catalog& catalog = this->catalog();
  const JobRecord first = this->MustAdd("j");
  JobRecord other = QueuedJob("k");
  other.set_request_id(first.request_id());
  const auto expect_first = [&](const JobRecord& record, const JobRecord& as_stored) {
    const auto again = catalog.AddJob(record);
    ASSERT_TRUE(again.ok()) << again.status();
    EXPECT_FALSE(again->changed);
    EXPECT_EQ(again->before, as_stored.state());
    EXPECT_TRUE(Same(again->job, as_stored));
    EXPECT_TRUE(again->weights.name().empty());
  };
  expect_first(QueuedJob("j"), first);
  expect_first(other, first);
  // Also once it has ended and its calibration is gone.
  const auto ended = catalog.CancelJob(this->tenant_, "j", absl::CancelledError("as asked"), kNow);
  ASSERT_TRUE(ended.ok());
  ASSERT_TRUE(catalog.RemoveCalibration(this->tenant_, "calibration").ok());
  expect_first(QueuedJob("j"), ended->job);
  expect_first(other, ended->job);

  CalibrationRecord bobs = FullCalibration("bob's");
  bobs.set_tenant("bob");
  ASSERT_TRUE(catalog.AddCalibration(bobs).ok());
  other.set_tenant("bob");
  other.set_calibration_id("bob's");
  this->MustAdd(other);
  for (const char* id : {"l", "m"}) {
    JobRecord without = QueuedJob(id);
    without.set_tenant("bob");
    without.set_calibration_id("bob's");
    without.clear_request_id();
    EXPECT_EQ(this->MustAdd(without).id(), id);
  }
  EXPECT_EQ(catalog.FindJobOfRequest(this->tenant_, first.request_id()).value()->id(), "j");
  EXPECT_EQ(catalog.FindJobOfRequest("bob", first.request_id()).value()->id(), "k");
  EXPECT_FALSE(catalog.FindJobOfRequest("bob", "never").value().has_value());
  this->Reopen();
  EXPECT_EQ(this->state_.jobs.size(), 4u);
}

TYPED_TEST(CatalogTest, JobsNeedAFinalizedCalibrationOfTheirTenant) {
  Catalog& catalog = this->catalog();
  EXPECT_TRUE(absl::IsNotFound(catalog.AddJob(QueuedJob("j")).status()));
  ASSERT_TRUE(catalog.AddCalibration(OpenCalibration("calibration")).ok());
  const absl::Status open = catalog.AddJob(QueuedJob("j")).status();
  EXPECT_TRUE(absl::IsFailedPrecondition(open)) << open;
  EXPECT_EQ(base::PreconditionOf(open)->type, "NOT_FINALIZED");
  SumsCommit commit;
  commit.finalize = true;
  commit.update_time = 1;
  ASSERT_TRUE(catalog.CommitSums("calibration", commit).ok());
  JobRecord bobs = QueuedJob("b");
  bobs.set_tenant("bob");
  EXPECT_TRUE(absl::IsNotFound(catalog.AddJob(bobs).status()));
  this->MustAdd("j");
  this->Reopen();
  EXPECT_EQ(this->state_.jobs.size(), 1u);
}

TYPED_TEST(CatalogTest, RecordsOfOtherTenantsAreNotFound) {
  this->AddFinalized();
  const JobRecord job = this->MustAdd("j");
  Catalog& catalog = this->catalog();
  const absl::Status reason = absl::CancelledError("as asked");
  for (const std::string& tenant : {std::string("bob"), std::string(), this->tenant_ + "x"}) {
    const absl::Status statuses[] = {catalog.FindCalibration(tenant, "calibration").status(),
                                     catalog.RemoveCalibration(tenant, "calibration").status(),
                                     catalog.FindJob(tenant, "j").status(),
                                     catalog.CancelJob(tenant, "j", reason, kNow).status(),
                                     catalog.RemoveJob(tenant, "j").status()};
    for (const absl::Status& status : statuses) EXPECT_TRUE(absl::IsNotFound(status)) << status;
    EXPECT_TRUE(catalog.Calibrations({tenant, ""}, std::nullopt, 9)->empty());
    EXPECT_TRUE(catalog.Jobs({tenant, {}, ""}, std::nullopt, 9)->empty());
    EXPECT_FALSE(catalog.FindJobOfRequest(tenant, job.request_id()).value().has_value());
  }
  // Nor is what was never there.
  const absl::Status statuses[] = {
      catalog.FindCalibration(this->tenant_, "' OR 1=1 --").status(),
      catalog.RemoveCalibration(this->tenant_, "never").status(),
      catalog.CommitSums("never", {}).status(),
      catalog.FindJob(this->tenant_, "' OR 1=1 --").status(),
      catalog.CancelJob(this->tenant_, "never", reason, kNow).status(),
      catalog.RemoveJob(this->tenant_, "never").status(),
      catalog.StartJob("never", "claim", kNow).status(),
      catalog.ReleaseJob("never", "claim").status(),
      catalog.FinishJob("never", "claim", {}).status(),
  };
  for (const absl::Status& status : statuses) EXPECT_TRUE(absl::IsNotFound(status)) << status;
  EXPECT_TRUE(Same(this->Stored("j"), job));
}

TYPED_TEST(CatalogTest, CommitSumsReplacesSumsAndPositions) {
  Catalog& catalog = this->catalog();
  const CalibrationRecord other = FullCalibration("other");
  ASSERT_TRUE(catalog.AddCalibration(other).ok());
  ASSERT_TRUE(catalog.AddCalibration(OpenCalibration("c")).ok());
  SumsCommit commit;
  commit.sums = MakeBlobRef("sums 1", 3);
  commit.tokens = 10;
  commit.held_out_tokens = 2;
  commit.streams = {MakeStream("zeta", 6, 20'480, false), MakeStream("new", 1, 3, true)};
  commit.update_time = 100;
  CalibrationRecord expected = OpenCalibration("c");
  *expected.mutable_sums() = commit.sums;
  expected.set_tokens(10);
  expected.set_held_out_tokens(2);
  for (const StreamRecord& stream : commit.streams) *expected.add_streams() = stream;
  expected.set_update_time(100);
  for (int repeated = 0; repeated < 2; ++repeated) {
    const auto committed = catalog.CommitSums("c", commit);
    ASSERT_TRUE(committed.ok()) << committed.status();
    EXPECT_TRUE(Same(*committed, expected));
  }

  commit.sums = MakeBlobRef("sums 2", 4);
  commit.streams = {MakeStream("zeta", 7, 20'481, false)};
  commit.update_time = 101;
  commit.finalize = true;
  commit.sums_sha256 = "sha256";
  *expected.mutable_sums() = commit.sums;
  expected.clear_streams();
  *expected.add_streams() = commit.streams[0];
  expected.set_update_time(101);
  expected.set_finalize_time(101);
  expected.set_sums_sha256("sha256");
  for (int repeated = 0; repeated < 2; ++repeated) {
    const auto committed = catalog.CommitSums("c", commit);
    ASSERT_TRUE(committed.ok()) << committed.status();
    EXPECT_TRUE(Same(*committed, expected));
  }
  // It takes no more.
  commit.sums = MakeBlobRef("sums 3", 5);
  const absl::Status refused = catalog.CommitSums("c", commit).status();
  EXPECT_TRUE(absl::IsFailedPrecondition(refused)) << refused;
  EXPECT_EQ(base::PreconditionOf(refused)->type, "FINALIZED");
  this->Reopen();
  EXPECT_TRUE(Same(this->state_.calibrations, std::vector{expected, other}));
}

TYPED_TEST(CatalogTest, KeepsAThousandStreams) {
  CalibrationRecord expected = OpenCalibration("c");
  ASSERT_TRUE(this->catalog().AddCalibration(expected).ok());
  for (int64_t round = 1; round <= 3; ++round) {
    SumsCommit commit;
    commit.update_time = round;
    for (int64_t i = 0; i < 1000; ++i) {
      commit.streams.push_back(MakeStream(std::to_string(i * 7919 % 1000), round, i, i % 2 == 0));
    }
    const auto committed = this->catalog().CommitSums("c", commit);
    ASSERT_TRUE(committed.ok()) << committed.status();
    expected = *committed;
    EXPECT_EQ(expected.streams_size(), 1000);
    EXPECT_EQ(expected.streams(999).sequence(), round);
  }
  this->Reopen();
  EXPECT_TRUE(Same(this->state_.calibrations, std::vector{expected}));
}

TYPED_TEST(CatalogTest, RemovalTakesOneRecordWithAllOfIt) {
  this->AddFinalized();
  Catalog& catalog = this->catalog();
  for (const char* id : {"a", "b"}) {
    ASSERT_TRUE(catalog.AddCalibration(FullCalibration(id)).ok());
    this->MustAdd(FullJob(id, 0));
  }
  const auto calibration = catalog.RemoveCalibration(this->tenant_, "a");
  ASSERT_TRUE(calibration.ok()) << calibration.status();
  EXPECT_TRUE(Same(*calibration, FullCalibration("a")));
  const auto job = catalog.RemoveJob(this->tenant_, "b");
  ASSERT_TRUE(job.ok()) << job.status();
  EXPECT_TRUE(Same(*job, FullJob("b", 2)));
  // A repetition finds them gone.
  EXPECT_TRUE(absl::IsNotFound(catalog.RemoveCalibration(this->tenant_, "a").status()));
  EXPECT_TRUE(absl::IsNotFound(catalog.RemoveJob(this->tenant_, "b").status()));
  this->Reopen();
  EXPECT_TRUE(Same(this->state_.calibrations,
                   std::vector{FullCalibration("b"), FullCalibration("calibration")}));
  EXPECT_TRUE(Same(this->state_.jobs, std::vector{FullJob("a", 1)}));
  // Nothing of it comes back with the next of that name.
  CalibrationRecord bare;
  bare.set_id("a");
  bare.set_tenant(this->tenant_);
  ASSERT_TRUE(this->catalog().AddCalibration(bare).ok());
  EXPECT_EQ(Ids(this->catalog().Calibrations({this->tenant_, "same"}, std::nullopt, 9)),
            (Strings{"calibration", "b"}));
  this->Reopen();
  EXPECT_TRUE(Same(this->state_.calibrations[0], bare));
}

TYPED_TEST(CatalogTest, CalibrationsInUseStay) {
  this->AddFinalized();
  Catalog& catalog = this->catalog();
  const auto expect_in_use = [&](int64_t jobs) {
    EXPECT_EQ(catalog.UnfinishedJobs("calibration").value_or(-1), jobs);
    const absl::Status status = catalog.RemoveCalibration(this->tenant_, "calibration").status();
    EXPECT_TRUE(absl::IsFailedPrecondition(status)) << status;
    EXPECT_EQ(base::PreconditionOf(status)->type, "IN_USE");
  };
  EXPECT_EQ(catalog.UnfinishedJobs("calibration").value_or(-1), 0);
  EXPECT_EQ(catalog.UnfinishedJobs("never").value_or(-1), 0);
  const JobRecord running = this->MustStart("running");
  expect_in_use(1);
  this->MustClaim("claimed");
  this->MustAdd("queued");
  expect_in_use(3);
  ASSERT_TRUE(catalog.FinishJob("running", running.claim(), {}).ok());
  for (const char* id : {"claimed", "queued"}) {
    ASSERT_TRUE(catalog.CancelJob(this->tenant_, id, absl::CancelledError("as asked"), kNow).ok());
  }
  // The claimed one is marked only.
  expect_in_use(1);
  const absl::Status status = absl::CancelledError("as asked");
  ASSERT_TRUE(catalog
                  .FinishJob("claimed", "claim of claimed",
                             {.status = status, .result = std::nullopt, .end_time = kNow})
                  .ok());
  EXPECT_EQ(catalog.UnfinishedJobs("calibration").value_or(-1), 0);
  EXPECT_TRUE(catalog.RemoveCalibration(this->tenant_, "calibration").ok());
}

TYPED_TEST(CatalogTest, JobsStayUntilTheyHaveEnded) {
  this->AddFinalized();
  this->MustStart("running");
  this->MustClaim("claimed");
  this->MustAdd("queued");
  for (const char* id : {"running", "claimed", "queued"}) {
    const absl::Status status = this->catalog().RemoveJob(this->tenant_, id).status();
    EXPECT_TRUE(absl::IsFailedPrecondition(status)) << status;
    EXPECT_EQ(base::PreconditionOf(status)->type, "NOT_ENDED");
  }
}

TYPED_TEST(CatalogTest, PagesOfCalibrationsAreNewestFirst) {
  Catalog& catalog = this->catalog();
  // Several of one time, and times below 0 as well.
  for (int i = 0; i < 12; ++i) {
    CalibrationRecord record = OpenCalibration(absl::StrCat("c", i));
    record.set_create_time(i / 3 - 2);
    record.clear_labels();
    record.add_labels(i % 2 == 0 ? "even" : "odd");
    record.add_labels("all");
    if (i % 5 == 0) record.add_labels("even");
    ASSERT_TRUE(catalog.AddCalibration(record).ok());
    CalibrationRecord bobs = record;
    bobs.set_id(absl::StrCat("b", i));
    bobs.set_tenant("bob");
    ASSERT_TRUE(catalog.AddCalibration(bobs).ok());
  }
  const Strings expected = {"c9", "c11", "c10", "c8", "c7", "c6",
                            "c5", "c4",  "c3",  "c2", "c1", "c0"};
  const auto pages = [&](const std::string& label, int64_t size) {
    return AllPages(size, [&](const std::optional<PageKey>& after, int64_t count) {
      return catalog.Calibrations({this->tenant_, label}, after, count);
    });
  };
  for (const int64_t size : {1, 2, 3, 5, 12, 100}) {
    EXPECT_EQ(pages("", size), expected) << size;
    EXPECT_EQ(pages("all", size), expected) << size;
    // Each once, though it was given the label twice.
    EXPECT_EQ(pages("even", size), (Strings{"c10", "c8", "c6", "c5", "c4", "c2", "c0"})) << size;
    EXPECT_EQ(pages("odd", size), (Strings{"c9", "c11", "c7", "c5", "c3", "c1"})) << size;
    EXPECT_EQ(pages("eve", size), Strings{}) << size;
  }
  EXPECT_TRUE(catalog.Calibrations({this->tenant_, ""}, std::nullopt, 0)->empty());
}

TYPED_TEST(CatalogTest, WhatComesAndGoesBetweenPagesShiftsNothing) {
  Catalog& catalog = this->catalog();
  for (int i = 0; i < 6; ++i) {
    CalibrationRecord record = OpenCalibration(absl::StrCat("c", i));
    record.set_create_time(i);
    ASSERT_TRUE(catalog.AddCalibration(record).ok());
  }
  EXPECT_EQ(Ids(catalog.Calibrations({this->tenant_, ""}, std::nullopt, 2)), (Strings{"c5", "c4"}));
  // A newer one comes, the last of the page goes.
  CalibrationRecord newer = OpenCalibration("newer");
  newer.set_create_time(7);
  ASSERT_TRUE(catalog.AddCalibration(newer).ok());
  ASSERT_TRUE(catalog.RemoveCalibration(this->tenant_, "c4").ok());
  EXPECT_EQ(Ids(catalog.Calibrations({this->tenant_, ""}, PageKey(4, "c4"), 2)),
            (Strings{"c3", "c2"}));
}

TYPED_TEST(CatalogTest, PagesOfJobsByStateAndCalibration) {
  Catalog& catalog = this->catalog();
  this->AddFinalized();
  ASSERT_TRUE(catalog.AddCalibration(FullCalibration("other")).ok());
  CalibrationRecord bobs = FullCalibration("bob's");
  bobs.set_tenant("bob");
  ASSERT_TRUE(catalog.AddCalibration(bobs).ok());
  const JobState states[] = {v1::JOB_STATE_QUEUED, v1::JOB_STATE_RUNNING,   v1::JOB_STATE_SUCCEEDED,
                             v1::JOB_STATE_FAILED, v1::JOB_STATE_CANCELLED, v1::JOB_STATE_EXPIRED};
  std::vector<JobRecord> all;
  for (int i = 0; i < 24; ++i) {
    JobRecord job = QueuedJob(absl::StrCat("j", 10 + i));
    job.set_create_time(i / 3);
    job.set_state(states[i % 6]);
    job.set_calibration_id(i % 4 == 0 ? "other" : "calibration");
    all.push_back(this->MustAdd(job));
    job.set_id(absl::StrCat("b", i));
    job.set_tenant("bob");
    job.set_calibration_id("bob's");
    this->MustAdd(job);
  }
  std::sort(all.begin(), all.end(), [](const JobRecord& a, const JobRecord& b) {
    return std::pair(a.create_time(), a.id()) > std::pair(b.create_time(), b.id());
  });
  for (unsigned wanted = 0; wanted < 64; ++wanted) {
    for (const std::string& calibration :
         {std::string(), std::string("other"), std::string("calibration"), std::string("never")}) {
      JobFilter filter{this->tenant_, {}, calibration};
      for (unsigned i = 0; i < 6; ++i) {
        if ((wanted >> i & 1) != 0) filter.states.push_back(states[i]);
      }
      Strings expected;
      for (const JobRecord& job : all) {
        const bool state = filter.states.empty() ||
                           std::find(filter.states.begin(), filter.states.end(), job.state()) !=
                               filter.states.end();
        if (state && (calibration.empty() || job.calibration_id() == calibration)) {
          expected.push_back(job.id());
        }
      }
      for (const int64_t size : {1, 5, 100}) {
        EXPECT_EQ(AllPages(size, [&](const std::optional<PageKey>& after,
                                     int64_t count) { return catalog.Jobs(filter, after, count); }),
                  expected)
            << wanted << " " << calibration << " " << size;
      }
    }
  }
}

TYPED_TEST(CatalogTest, ClaimsByPriorityThenAge) {
  Catalog& catalog = this->catalog();
  EXPECT_FALSE(catalog.ClaimJob("us", "claim", {}).value().has_value());
  this->AddFinalized();
  const std::pair<const char*, int> jobs[] = {{"low", -5},   {"first", 0}, {"second", 0},
                                              {"high", 100}, {"third", 0}, {"higher", 101}};
  for (const auto& [id, priority] : jobs) {
    JobRecord job = QueuedJob(id);
    job.set_priority(priority);
    // Neither decides.
    job.set_create_time(-priority);
    this->MustAdd(job);
  }
  const Strings order = {"higher", "high", "first", "second", "third", "low"};
  for (size_t i = 0; i < order.size(); ++i) {
    EXPECT_EQ(catalog.Ahead(this->Stored(order[i])).value_or(-2), static_cast<int64_t>(i));
  }
  for (const std::string& id : order) {
    const std::string claim = absl::StrCat("claim ", id);
    const auto claimed = catalog.ClaimJob("us", claim, {});
    ASSERT_TRUE(claimed.ok() && claimed->has_value()) << claimed.status();
    EXPECT_EQ((*claimed)->id(), id);
    EXPECT_EQ((*claimed)->owner(), "us");
    EXPECT_EQ((*claimed)->claim(), claim);
    EXPECT_EQ((*claimed)->state(), v1::JOB_STATE_QUEUED);
    EXPECT_EQ((*claimed)->starts(), 0);
    EXPECT_TRUE(Same(this->Stored(id), **claimed));
    // The answer was lost.
    const auto again = catalog.ClaimJob("us", claim, {});
    ASSERT_TRUE(again.ok() && again->has_value()) << again.status();
    EXPECT_TRUE(Same(**again, **claimed));
  }
  EXPECT_FALSE(catalog.ClaimJob("us", "claim", {}).value().has_value());
  // Nor does what was given back lose its place.
  for (const char* id : {"third", "first"}) {
    ASSERT_TRUE(catalog.ReleaseJob(id, absl::StrCat("claim ", id)).ok());
  }
  EXPECT_EQ(catalog.ClaimJob("us", "claim", {}).value()->id(), "first");
}

TYPED_TEST(CatalogTest, AheadCountsWhatIsQueued) {
  Catalog& catalog = this->catalog();
  this->AddFinalized();
  const auto ahead = [&](const std::string& id) {
    return catalog.Ahead(this->Stored(id)).value_or(-2);
  };
  this->MustStart("running");
  EXPECT_EQ(ahead("running"), -1);
  // Claimed, but not started yet.
  this->MustClaim("claimed");
  this->MustAdd("queued");
  EXPECT_EQ(ahead("claimed"), 0);
  EXPECT_EQ(ahead("queued"), 1);
  // All tenants share the queue.
  CalibrationRecord calibration = FullCalibration("bob's");
  calibration.set_tenant("bob");
  ASSERT_TRUE(catalog.AddCalibration(calibration).ok());
  JobRecord bobs = QueuedJob("bob's");
  bobs.set_tenant("bob");
  bobs.set_calibration_id("bob's");
  bobs.set_priority(1);
  EXPECT_EQ(catalog.Ahead(this->MustAdd(bobs)).value_or(-2), 0);
  EXPECT_EQ(ahead("queued"), 2);
  ASSERT_TRUE(catalog.CancelJob("bob", "bob's", absl::CancelledError("as asked"), kNow).ok());
  EXPECT_EQ(ahead("queued"), 1);
  ASSERT_TRUE(
      catalog.CancelJob(this->tenant_, "queued", absl::CancelledError("as asked"), kNow).ok());
  EXPECT_EQ(ahead("queued"), -1);
}

TYPED_TEST(CatalogTest, OverdueJobsHaveNotEnded) {
  Catalog& catalog = this->catalog();
  this->AddFinalized();
  for (const JobState state : {v1::JOB_STATE_QUEUED, v1::JOB_STATE_RUNNING, v1::JOB_STATE_SUCCEEDED,
                               v1::JOB_STATE_EXPIRED}) {
    for (const int64_t deadline : {0, 99, 100, 101}) {
      JobRecord job = QueuedJob(absl::StrCat(state, " ", deadline));
      job.set_state(state);
      job.set_deadline_time(deadline);
      this->MustAdd(job);
    }
  }
  EXPECT_EQ(Sorted(Ids(catalog.OverdueJobs(100))), (Strings{"1 100", "1 99", "2 100", "2 99"}));
  EXPECT_EQ(Ids(catalog.OverdueJobs(98)), Strings{});
}

TYPED_TEST(CatalogTest, ExpiredJobsHaveEndedLongEnoughAgo) {
  Catalog& catalog = this->catalog();
  this->AddFinalized();
  for (const JobState state : {v1::JOB_STATE_QUEUED, v1::JOB_STATE_RUNNING, v1::JOB_STATE_SUCCEEDED,
                               v1::JOB_STATE_CANCELLED}) {
    for (const int64_t end : {69, 70, 71}) {
      JobRecord job = QueuedJob(absl::StrCat(state, " ", end));
      job.set_state(state);
      job.set_ttl_micros(30);
      job.set_end_time(end);
      this->MustAdd(job);
    }
  }
  EXPECT_EQ(Sorted(Ids(catalog.ExpiredJobs(100))), (Strings{"3 69", "3 70", "5 69", "5 70"}));
  EXPECT_EQ(Ids(catalog.ExpiredJobs(98)), Strings{});
}

TYPED_TEST(CatalogTest, CalibrationsExpireAfterTheirLastChange) {
  Catalog& catalog = this->catalog();
  for (const int64_t update : {70, 69, 71}) {
    CalibrationRecord record = OpenCalibration(absl::StrCat(update));
    record.set_update_time(update);
    record.set_ttl_micros(30);
    if (update == 70) record.set_finalize_time(70);
    ASSERT_TRUE(catalog.AddCalibration(record).ok());
  }
  EXPECT_EQ(Ids(catalog.ExpiredCalibrations(98)), Strings{});
  EXPECT_EQ(Ids(catalog.ExpiredCalibrations(100)), (Strings{"69", "70"}));
  SumsCommit commit;
  commit.update_time = 75;
  ASSERT_TRUE(catalog.CommitSums("69", commit).ok());
  EXPECT_EQ(Ids(catalog.ExpiredCalibrations(100)), (Strings{"70"}));
}

TYPED_TEST(CatalogTest, ForeignClaimsAreAborted) {
  Catalog& catalog = this->catalog();
  this->AddFinalized();
  ResultRecord result;
  *result.mutable_blob() = MakeBlobRef("result", 1);
  const JobOutcome outcome{.status = absl::OkStatus(), .result = result, .end_time = kNow};
  this->MustStart("running");
  this->MustFinish("ended", absl::OkStatus());
  this->MustClaim("claimed");
  this->MustAdd("queued");
  for (const char* id : {"queued", "claimed", "running", "ended"}) {
    const JobRecord before = this->Stored(id);
    for (const char* claim : {"of another", ""}) {
      const absl::Status statuses[] = {catalog.StartJob(id, claim, kNow).status(),
                                       catalog.FinishJob(id, claim, outcome).status()};
      for (const absl::Status& status : statuses) {
        EXPECT_TRUE(absl::IsAborted(status)) << id << " " << claim << ": " << status;
      }
    }
    // Its claim may have been given back before.
    const auto released = catalog.ReleaseJob(id, "of another");
    ASSERT_TRUE(released.ok()) << released.status();
    EXPECT_FALSE(released->changed);
    EXPECT_TRUE(Same(released->job, before));
    EXPECT_TRUE(Same(this->Stored(id), before)) << id;
  }
}

TYPED_TEST(CatalogTest, ALifeOfAJobRepeated) {
  Catalog& catalog = this->catalog();
  this->AddFinalized();
  const JobRecord claimed = this->MustClaim("j");
  const std::string& claim = claimed.claim();
  // Each call twice, as if the first answer had been lost: later ones change nothing.
  for (int repeated = 0; repeated < 2; ++repeated) {
    const auto change = catalog.StartJob("j", claim, 100 + repeated);
    ASSERT_TRUE(change.ok()) << change.status();
    EXPECT_EQ(change->changed, repeated == 0);
    EXPECT_EQ(change->before, repeated == 0 ? v1::JOB_STATE_QUEUED : v1::JOB_STATE_RUNNING);
    EXPECT_EQ(change->job.state(), v1::JOB_STATE_RUNNING);
    EXPECT_EQ(change->job.start_time(), 100);
    EXPECT_EQ(change->job.starts(), 1);
    EXPECT_TRUE(Same(this->Stored("j"), change->job));
  }
  for (int repeated = 0; repeated < 2; ++repeated) {
    const auto change = catalog.ReleaseJob("j", claim);
    ASSERT_TRUE(change.ok()) << change.status();
    EXPECT_EQ(change->changed, repeated == 0);
    EXPECT_EQ(change->job.state(), v1::JOB_STATE_QUEUED);
    EXPECT_EQ(change->job.starts(), 0);
    EXPECT_EQ(change->job.owner(), "");
    EXPECT_TRUE(change->weights.name().empty());
    EXPECT_TRUE(Same(this->Stored("j"), change->job));
  }
  EXPECT_TRUE(absl::IsAborted(catalog.StartJob("j", claim, kNow).status()));
  ASSERT_TRUE(catalog.ClaimJob("us", "another claim", {}).value().has_value());
  // That of before gives nothing back.
  ASSERT_TRUE(catalog.ReleaseJob("j", claim).ok());
  EXPECT_EQ(this->Stored("j").claim(), "another claim");
  ASSERT_TRUE(catalog.StartJob("j", "another claim", 200).ok());
  ResultRecord result;
  *result.mutable_blob() = MakeBlobRef("result", 1);
  for (int repeated = 0; repeated < 2; ++repeated) {
    const auto change = catalog.FinishJob(
        "j", "another claim",
        {.status = absl::OkStatus(), .result = result, .end_time = 300 + repeated});
    ASSERT_TRUE(change.ok()) << change.status();
    EXPECT_EQ(change->changed, repeated == 0);
    EXPECT_EQ(change->before, repeated == 0 ? v1::JOB_STATE_RUNNING : v1::JOB_STATE_SUCCEEDED);
    EXPECT_EQ(change->job.state(), v1::JOB_STATE_SUCCEEDED);
    EXPECT_EQ(change->job.end_time(), 300);
    EXPECT_TRUE(Same(change->job.result(), result));
    EXPECT_FALSE(change->job.has_weights());
    EXPECT_EQ(change->job.owner(), "");
    // Told once, to whoever forgets the blob.
    EXPECT_EQ(change->weights.name(), repeated == 0 ? "weights" : "");
    EXPECT_TRUE(Same(this->Stored("j"), change->job));
  }
  // Nor does another outcome change it.
  EXPECT_FALSE(
      catalog
          .FinishJob(
              "j", "another claim",
              {.status = absl::InternalError("late"), .result = std::nullopt, .end_time = 400})
          ->changed);
  EXPECT_TRUE(absl::IsAborted(catalog.StartJob("j", "another claim", kNow).status()));
  const JobRecord ended = this->Stored("j");
  this->Reopen();
  EXPECT_TRUE(Same(this->state_.jobs, std::vector{ended}));
}

TYPED_TEST(CatalogTest, OutcomesHaveTheirStates) {
  this->AddFinalized();
  const std::pair<absl::Status, JobState> outcomes[] = {
      {absl::CancelledError("as asked"), v1::JOB_STATE_CANCELLED},
      {absl::DeadlineExceededError("too late"), v1::JOB_STATE_EXPIRED},
      {base::PreconditionError("DAMPING", "spec.damping", "no"), v1::JOB_STATE_FAILED},
      {absl::InternalError("why"), v1::JOB_STATE_FAILED},
  };
  for (const auto& [status, state] : outcomes) {
    const JobRecord job = this->MustFinish(absl::StrCat(status.message()), status);
    EXPECT_EQ(job.state(), state);
    EXPECT_EQ(job.error().code(), static_cast<int>(status.code()));
    EXPECT_EQ(job.error().message(), status.message());
    EXPECT_EQ(job.error().details_size(), base::PreconditionOf(status).has_value() ? 1 : 0);
    EXPECT_FALSE(job.has_weights());
    EXPECT_FALSE(job.has_result());
  }
}

TYPED_TEST(CatalogTest, CancelEndsWhatNobodyHasAndMarksTheRest) {
  Catalog& catalog = this->catalog();
  this->AddFinalized();
  const absl::Status asked = absl::CancelledError("as asked");
  const absl::Status late = absl::DeadlineExceededError("too late");
  this->MustStart("running");
  const JobRecord ended = this->MustFinish("ended", absl::OkStatus());
  this->MustClaim("claimed");
  for (const auto& [id, first, second] :
       {std::tuple{"running", asked, late}, std::tuple{"claimed", late, asked}}) {
    JobRecord expected = this->Stored(id);
    expected.set_cancel_code(static_cast<int>(first.code()));
    // The first reason stays.
    for (const absl::Status& reason : {first, first, second}) {
      const auto change = catalog.CancelJob(this->tenant_, id, reason, kNow);
      ASSERT_TRUE(change.ok()) << change.status();
      EXPECT_FALSE(change->changed);
      EXPECT_EQ(change->before, expected.state());
      EXPECT_TRUE(change->weights.name().empty());
      EXPECT_TRUE(Same(change->job, expected));
      EXPECT_TRUE(Same(this->Stored(id), expected));
    }
  }
  for (const auto& [id, reason] : {std::pair{"by a client", asked}, std::pair{"overdue", late}}) {
    this->MustAdd(id);
    for (int repeated = 0; repeated < 2; ++repeated) {
      const auto change = catalog.CancelJob(this->tenant_, id, reason, 100 + repeated);
      ASSERT_TRUE(change.ok()) << change.status();
      EXPECT_EQ(change->changed, repeated == 0);
      EXPECT_EQ(change->job.state(), StateOf(reason.code()));
      EXPECT_EQ(change->job.error().message(), reason.message());
      EXPECT_EQ(change->job.end_time(), 100);
      EXPECT_FALSE(change->job.has_weights());
      EXPECT_EQ(change->weights.name(), repeated == 0 ? "weights" : "");
      EXPECT_TRUE(Same(this->Stored(id), change->job));
    }
  }
  const auto change = catalog.CancelJob(this->tenant_, "ended", asked, kNow);
  ASSERT_TRUE(change.ok()) << change.status();
  EXPECT_FALSE(change->changed);
  EXPECT_TRUE(Same(this->Stored("ended"), ended));
}

TYPED_TEST(CatalogTest, RegisterFencesWhoeverClaimedBefore) {
  this->AddFinalized();
  const JobRecord running = this->MustStart("running");
  const JobRecord asked = this->MustStart("asked");
  const JobRecord late = this->MustStart("late");
  const JobRecord ended = this->MustFinish("ended", absl::OkStatus());
  const JobRecord claimed = this->MustClaim("claimed");
  const JobRecord queued = this->MustAdd("queued");
  Catalog& before = this->catalog();
  ASSERT_TRUE(before.CancelJob(this->tenant_, "asked", absl::CancelledError("so"), kNow).ok());
  ASSERT_TRUE(
      before.CancelJob(this->tenant_, "late", absl::DeadlineExceededError("so"), kNow).ok());
  this->Reopen();
  std::map<std::string, JobRecord> jobs;
  for (const JobRecord& job : this->state_.jobs) {
    jobs[job.id()] = job;
    EXPECT_TRUE(Same(this->Stored(job.id()), job));
  }
  EXPECT_TRUE(Same(jobs["ended"], ended));
  EXPECT_TRUE(Same(jobs["queued"], queued));
  for (const auto& [id, was] : {std::pair{"running", running}, std::pair{"claimed", claimed}}) {
    EXPECT_TRUE(Same(jobs[id], Fence(was, kNow)));
    EXPECT_EQ(jobs[id].state(), v1::JOB_STATE_QUEUED);
    EXPECT_EQ(jobs[id].owner(), "");
    EXPECT_EQ(jobs[id].starts(), was.starts());
    EXPECT_EQ(jobs[id].weights().name(), "weights");
    // Who had it before is told so, whatever it does.
    EXPECT_TRUE(absl::IsAborted(this->catalog().StartJob(id, was.claim(), kNow).status()));
    EXPECT_TRUE(absl::IsAborted(this->catalog().FinishJob(id, was.claim(), {}).status()));
  }
  for (const auto& [id, state] :
       {std::pair{"asked", v1::JOB_STATE_CANCELLED}, std::pair{"late", v1::JOB_STATE_EXPIRED}}) {
    EXPECT_EQ(jobs[id].state(), state);
    EXPECT_EQ(jobs[id].end_time(), kNow);
    EXPECT_FALSE(jobs[id].has_weights());
  }
  // By age, as before.
  for (const char* id : {"running", "claimed", "queued"}) {
    EXPECT_EQ(this->catalog().ClaimJob("us", id, {}).value()->id(), id);
  }
}

TYPED_TEST(CatalogTest, AJobThatTakesTheServerDownIsGivenUp) {
  this->AddFinalized();
  this->MustAdd("j");
  for (int start = 1; start <= kMaxStarts; ++start) {
    const std::string claim = absl::StrCat("claim ", start);
    ASSERT_TRUE(this->catalog().ClaimJob("us", claim, {}).value().has_value()) << start;
    EXPECT_EQ(this->catalog().StartJob("j", claim, kNow)->job.starts(), start);
    this->Reopen();
  }
  const JobRecord& job = this->state_.jobs[0];
  EXPECT_EQ(job.state(), v1::JOB_STATE_FAILED);
  EXPECT_EQ(job.starts(), kMaxStarts);
  EXPECT_EQ(job.error().code(), static_cast<int>(absl::StatusCode::kInternal));
  EXPECT_FALSE(job.has_weights());
  EXPECT_FALSE(this->catalog().ClaimJob("us", "claim", {}).value().has_value());
}

TYPED_TEST(CatalogTest, ThreadsDoNotDisturbEachOther) {
  constexpr int kThreads = 4;
  constexpr int kJobs = 40;
  constexpr int kCommits = 12;
  this->AddFinalized();
  for (int i = 0; i < kJobs; ++i) this->MustAdd(absl::StrCat("j", i));
  std::array<std::set<std::string>, kThreads> ran;
  std::vector<std::thread> threads;
  threads.reserve(kThreads);
  for (size_t t = 0; t < kThreads; ++t) {
    threads.emplace_back([this, t, &ran] {
      Catalog& catalog = this->catalog();
      const std::string name = absl::StrCat("c", t);
      EXPECT_TRUE(catalog.AddCalibration(OpenCalibration(name)).ok());
      for (int round = 1; round <= kCommits; ++round) {
        SumsCommit commit;
        commit.tokens = round;
        EXPECT_TRUE(catalog.CommitSums(name, commit).ok());
        EXPECT_EQ(catalog.FindCalibration(this->tenant_, name)->tokens(), round);
      }
      for (int claims = 0;; ++claims) {
        const std::string claim = absl::StrCat(t, " ", claims);
        const auto job = catalog.ClaimJob("us", claim, {});
        ASSERT_TRUE(job.ok()) << job.status();
        if (!job->has_value()) break;
        ran[t].insert((*job)->id());
        EXPECT_TRUE(catalog.StartJob((*job)->id(), claim, kNow).ok());
        EXPECT_TRUE(catalog.FinishJob((*job)->id(), claim, {}).ok());
        // Every other one.
        if (claims % 2 != 0) continue;
        EXPECT_TRUE(catalog.RemoveJob(this->tenant_, (*job)->id()).ok());
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
  size_t total = 0;
  std::set<std::string> all;
  size_t left = 0;
  for (const auto& ids : ran) {
    total += ids.size();
    left += ids.size() / 2;
    all.insert(ids.begin(), ids.end());
  }
  // Each by one of them.
  EXPECT_EQ(total, static_cast<size_t>(kJobs));
  EXPECT_EQ(all.size(), static_cast<size_t>(kJobs));
  this->Reopen();
  EXPECT_EQ(this->state_.jobs.size(), left);
  for (size_t t = 0; t < kThreads; ++t) {
    EXPECT_EQ(this->StoredCalibration(absl::StrCat("c", t)).tokens(), kCommits);
  }
}

}  // namespace
}  // namespace certiq::server::testing
