// What every store does, and what outlives one that is durable.

#include "store/store.h"

#include <gtest/gtest.h>

#include <cmath>
#include <limits>
#include <memory>
#include <thread>
#include <type_traits>
#include <utility>

#include "store/memory_store.h"
#include "store/sqlite_store.h"
#include "store/store_examples.h"
#include "support/text.h"

namespace certiq::server::testing {
namespace {

constexpr int64_t kMebi = int64_t{1} << 20;

struct InMemory {
  static constexpr bool kDurable = false;
};
struct OnDisk {
  static constexpr bool kDurable = true;
};

template <typename Kind>
class StoreTest : public ::testing::Test {
 protected:
  void SetUp() override { Reopen(); }

  // As if the server had ended and started again; a store in memory stays.
  void Reopen() {
    if constexpr (Kind::kDurable) {
      store_.reset();
      auto opened = OpenSqliteStore(directory_.data());
      ASSERT_TRUE(opened.ok()) << opened.status();
      store_ = *std::move(opened);
    } else {
      if (store_ == nullptr) store_ = NewMemoryStore();
    }
    auto state = store_->Load();
    ASSERT_TRUE(state.ok()) << state.status();
    state_ = *std::move(state);
  }

  BlobRef MustWrite(std::span<const std::byte> bytes) {
    const auto blob = WriteBlob(*store_, bytes);
    EXPECT_TRUE(blob.ok()) << blob.status();
    return blob.ok() ? *blob : BlobRef();
  }

  TemporaryDirectory directory_;
  std::unique_ptr<Store> store_;
  StoredState state_;
};

struct KindNames {
  template <typename Kind>
  static std::string GetName(int) {
    return Kind::kDurable ? "OnDisk" : "InMemory";
  }
};
using Kinds = ::testing::Types<InMemory, OnDisk>;
TYPED_TEST_SUITE(StoreTest, Kinds, KindNames);

TYPED_TEST(StoreTest, StartsEmptyAndSaysWhetherItLasts) {
  EXPECT_EQ(this->store_->durable(), TypeParam::kDurable);
  EXPECT_TRUE(this->state_.calibrations.empty());
  EXPECT_TRUE(this->state_.jobs.empty());
}

TYPED_TEST(StoreTest, KeepsEveryField) {
  const CalibrationRecord calibration = FullCalibration(std::string("c'\0\xff", 4));
  const JobRecord job = FullJob(std::string("j\"\0\xfe", 4), std::numeric_limits<int64_t>::max());
  ASSERT_TRUE(this->store_->PutCalibration(calibration).ok());
  ASSERT_TRUE(this->store_->PutJob(job).ok());
  this->Reopen();
  EXPECT_EQ(this->state_.calibrations, std::vector{calibration});
  EXPECT_EQ(this->state_.jobs, std::vector{job});
}

TYPED_TEST(StoreTest, KeepsDefaults) {
  ASSERT_TRUE(this->store_->PutCalibration({}).ok());
  ASSERT_TRUE(this->store_->PutJob({}).ok());
  this->Reopen();
  EXPECT_EQ(this->state_.calibrations, std::vector{CalibrationRecord()});
  EXPECT_EQ(this->state_.jobs, std::vector{JobRecord()});
}

TYPED_TEST(StoreTest, KeepsUnusualNumbers) {
  using Limits = std::numeric_limits<double>;
  const double values[] = {Limits::max(), -Limits::min(), Limits::infinity(), -0.0,
                           0x1.fffffffffffffp-3};
  int64_t number = std::numeric_limits<int64_t>::min();
  std::vector<JobRecord> jobs;
  for (const double value : values) {
    JobRecord job = FullJob(std::to_string(number), number);
    ++number;
    job.relative_error = value;
    ASSERT_TRUE(this->store_->PutJob(job).ok());
    jobs.push_back(job);
  }
  JobRecord nan = FullJob("nan", number);
  nan.lambda_used = -Limits::quiet_NaN();
  ASSERT_TRUE(this->store_->PutJob(nan).ok());
  this->Reopen();
  ASSERT_EQ(this->state_.jobs.size(), jobs.size() + 1);
  EXPECT_TRUE(std::isnan(this->state_.jobs.back().lambda_used));
  this->state_.jobs.pop_back();
  EXPECT_EQ(this->state_.jobs, jobs);
}

TYPED_TEST(StoreTest, JobsComeByNumber) {
  for (const int64_t number : {3, 1, 2}) {
    ASSERT_TRUE(this->store_->PutJob(FullJob(std::to_string(10 - number), number)).ok());
  }
  this->Reopen();
  ASSERT_EQ(this->state_.jobs.size(), 3u);
  for (int64_t i = 0; i < 3; ++i) {
    EXPECT_EQ(this->state_.jobs[static_cast<size_t>(i)].number, i + 1);
  }
}

TYPED_TEST(StoreTest, PutReplacesTheWholeRecord) {
  CalibrationRecord calibration = FullCalibration("c");
  JobRecord job = FullJob("j", 1);
  ASSERT_TRUE(this->store_->PutCalibration(calibration).ok());
  ASSERT_TRUE(this->store_->PutJob(job).ok());
  calibration.streams = {{"zeta", 6, 20'480, false}, {"new", 1, 3, true}};
  calibration.labels.clear();
  calibration.sums = {};
  job = JobRecord();
  job.id = "j";
  ASSERT_TRUE(this->store_->PutCalibration(calibration).ok());
  ASSERT_TRUE(this->store_->PutJob(job).ok());
  this->Reopen();
  EXPECT_EQ(this->state_.calibrations, std::vector{calibration});
  EXPECT_EQ(this->state_.jobs, std::vector{job});
}

TYPED_TEST(StoreTest, KeepsAThousandStreams) {
  CalibrationRecord calibration = FullCalibration("c");
  const CalibrationRecord other = FullCalibration("d");
  ASSERT_TRUE(this->store_->PutCalibration(other).ok());
  for (int64_t round = 1; round <= 3; ++round) {
    calibration.streams.clear();
    for (int64_t i = 0; i < 1000; ++i) {
      calibration.streams.push_back({std::to_string(i * 7919 % 1000), round, i, i % 2 == 0});
    }
    ASSERT_TRUE(this->store_->PutCalibration(calibration).ok());
  }
  this->Reopen();
  EXPECT_EQ(this->state_.calibrations, (std::vector{calibration, other}));
}

TYPED_TEST(StoreTest, DeleteRemovesOneRecord) {
  for (const char* id : {"a", "b"}) {
    ASSERT_TRUE(this->store_->PutCalibration(FullCalibration(id)).ok());
    ASSERT_TRUE(this->store_->PutJob(FullJob(id, id[0])).ok());
  }
  EXPECT_TRUE(this->store_->DeleteCalibration("a").ok());
  EXPECT_TRUE(this->store_->DeleteJob("b").ok());
  EXPECT_TRUE(this->store_->DeleteCalibration("never there").ok());
  EXPECT_TRUE(this->store_->DeleteJob("' OR 1=1 --").ok());
  this->Reopen();
  EXPECT_EQ(this->state_.calibrations, std::vector{FullCalibration("b")});
  EXPECT_EQ(this->state_.jobs, std::vector{FullJob("a", 'a')});
  // Nothing of it comes back with the next of that name.
  CalibrationRecord bare;
  bare.id = "a";
  ASSERT_TRUE(this->store_->PutCalibration(bare).ok());
  this->Reopen();
  EXPECT_EQ(this->state_.calibrations[0], bare);
}

TYPED_TEST(StoreTest, BlobsOfEverySizeComeBackInAnyRange) {
  const int64_t sizes[] = {0, 1, 4095, kMebi - 1, kMebi, kMebi + 1, 2 * kMebi, 3 * kMebi + 12'345};
  JobRecord job = FullJob("j", 1);
  for (const int64_t size : sizes) {
    const std::vector<std::byte> bytes = Pattern("blob", size);
    job.weights = {};
    job.result = this->MustWrite(bytes);
    EXPECT_EQ(job.result.bytes, size);
    EXPECT_FALSE(job.result.empty());
    ASSERT_TRUE(this->store_->PutJob(job).ok());
    this->Reopen();
    auto reader = this->store_->OpenBlob(job.result);
    ASSERT_TRUE(reader.ok()) << reader.status();
    const int64_t ends[] = {0, 1, size / 3, kMebi - 1, kMebi, kMebi + 1, 2 * kMebi, size - 1, size};
    for (const int64_t begin : ends) {
      for (const int64_t end : ends) {
        if (begin < 0 || end > size || begin > end) continue;
        std::vector<std::byte> part(static_cast<size_t>(end - begin));
        ASSERT_TRUE((*reader)->Read(begin, part).ok());
        EXPECT_TRUE(std::equal(part.begin(), part.end(), bytes.begin() + begin))
            << begin << " to " << end << " of " << size;
      }
    }
  }
}

TYPED_TEST(StoreTest, ReaderOutlivesItsBlob) {
  const std::vector<std::byte> bytes = Pattern("gone", 2 * kMebi);
  const BlobRef blob = this->MustWrite(bytes);
  auto reader = this->store_->OpenBlob(blob);
  ASSERT_TRUE(reader.ok());
  this->store_->DeleteBlob(blob);
  this->store_->DeleteBlob(blob);
  std::vector<std::byte> read(bytes.size());
  EXPECT_TRUE((*reader)->Read(0, read).ok());
  EXPECT_TRUE(read == bytes);
  EXPECT_TRUE(absl::IsDataLoss(this->store_->OpenBlob(blob).status()));
}

TYPED_TEST(StoreTest, MissingBlobIsDataLossButItsRecordLoads) {
  JobRecord job = FullJob("j", 1);
  job.result = {std::string(32, 'a'), 5};
  job.weights = {"../../../../etc/passwd", 5};
  ASSERT_TRUE(this->store_->PutJob(job).ok());
  this->Reopen();
  EXPECT_EQ(this->state_.jobs, std::vector{job});
  for (const BlobRef& blob : {job.result, job.weights, BlobRef{std::string(31, 'a') + '\0', 5}}) {
    const absl::Status lost = this->store_->OpenBlob(blob).status();
    EXPECT_TRUE(absl::IsDataLoss(lost)) << lost;
    this->store_->DeleteBlob(blob);
  }
}

TYPED_TEST(StoreTest, WrongSizeInARecordIsDataLoss) {
  BlobRef blob = this->MustWrite(Pattern("x", 1000));
  for (const int64_t size : {int64_t{0}, int64_t{999}, int64_t{1001}, int64_t{-1},
                             std::numeric_limits<int64_t>::max()}) {
    blob.bytes = size;
    EXPECT_TRUE(absl::IsDataLoss(this->store_->OpenBlob(blob).status())) << size;
  }
}

TYPED_TEST(StoreTest, NextStartRemovesBlobsWithoutRecord) {
  const std::vector<std::byte> bytes = Pattern("kept", 1000);
  JobRecord job = FullJob("j", 1);
  CalibrationRecord calibration = FullCalibration("c");
  job.weights = this->MustWrite(bytes);
  job.result = this->MustWrite(bytes);
  calibration.sums = this->MustWrite(bytes);
  const BlobRef orphan = this->MustWrite(bytes);
  ASSERT_TRUE(this->store_->PutJob(job).ok());
  ASSERT_TRUE(this->store_->PutCalibration(calibration).ok());
  this->Reopen();
  EXPECT_TRUE(absl::IsDataLoss(this->store_->OpenBlob(orphan).status()));
  for (const BlobRef& blob : {job.weights, job.result, calibration.sums}) {
    const auto read = ReadBlob(*this->store_, blob);
    ASSERT_TRUE(read.ok()) << read.status();
    EXPECT_TRUE(*read == bytes);
  }
}

TYPED_TEST(StoreTest, ThreadsDoNotDisturbEachOther) {
  constexpr int64_t kThreads = 4;
  constexpr int64_t kRounds = 12;
  std::vector<std::thread> threads;
  threads.reserve(kThreads);
  for (int64_t t = 0; t < kThreads; ++t) {
    threads.emplace_back([this, t] {
      const std::vector<std::byte> bytes = Pattern(std::to_string(t), kMebi + t);
      for (int64_t round = 0; round < kRounds; ++round) {
        JobRecord job = FullJob(std::to_string(t), t);
        job.starts = static_cast<int32_t>(round);
        job.weights = {};
        job.result = this->MustWrite(bytes);
        EXPECT_TRUE(this->store_->PutJob(job).ok());
        CalibrationRecord calibration = FullCalibration(std::to_string(t));
        calibration.tokens = round;
        EXPECT_TRUE(this->store_->PutCalibration(calibration).ok());
        const auto read = ReadBlob(*this->store_, job.result);
        EXPECT_TRUE(read.ok() && *read == bytes);
        if (round + 1 < kRounds) this->store_->DeleteBlob(job.result);
        if (round % 2 == 0) {
          EXPECT_TRUE(this->store_->DeleteCalibration(calibration.id).ok());
        }
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
  this->Reopen();
  ASSERT_EQ(this->state_.jobs.size(), static_cast<size_t>(kThreads));
  EXPECT_EQ(this->state_.calibrations.size(), static_cast<size_t>(kThreads));
  for (const JobRecord& job : this->state_.jobs) {
    EXPECT_EQ(job.starts, kRounds - 1);
    const auto read = ReadBlob(*this->store_, job.result);
    EXPECT_TRUE(read.ok() && *read == Pattern(job.id, kMebi + job.number));
  }
}

TYPED_TEST(StoreTest, ThreadsShareAReader) {
  const std::vector<std::byte> bytes = Pattern("shared", 2 * kMebi + 1);
  auto reader = this->store_->OpenBlob(this->MustWrite(bytes));
  ASSERT_TRUE(reader.ok());
  std::vector<std::thread> threads;
  threads.reserve(4);
  for (size_t t = 0; t < 4; ++t) {
    threads.emplace_back([&, t] {
      for (size_t at = t; at + 1000 < bytes.size(); at += 300'007) {
        std::vector<std::byte> part(1000);
        EXPECT_TRUE((*reader)->Read(static_cast<int64_t>(at), part).ok());
        EXPECT_TRUE(
            std::equal(part.begin(), part.end(), bytes.begin() + static_cast<ptrdiff_t>(at)));
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
}

}  // namespace
}  // namespace certiq::server::testing
