// A disk that fails once, at every operation of a store's life in turn.

#include "store/store_faults.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cerrno>
#include <filesystem>
#include <memory>
#include <utility>

#include "base/status.h"
#include "store/sqlite_store.h"
#include "store/store_examples.h"
#include "store/store_script.h"
#include "support/text.h"

namespace certiq::server::testing {
namespace {

void ExpectRefusal(const absl::Status& status, Failure failure, const std::string& when) {
  const absl::StatusCode code = failure == Failure::kBroken ? absl::StatusCode::kUnavailable
                                                            : absl::StatusCode::kResourceExhausted;
  EXPECT_EQ(status.code(), code) << when << ": " << status;
  EXPECT_EQ(base::RetryAfterOf(status), base::kRetrySoon) << when << ": " << status;
}

// What a crash of the process would leave now: the files of an open store.
void ExpectImage(const TemporaryDirectory& directory, const std::vector<Model>& models,
                 const std::string& when) {
  const std::filesystem::path image = directory.path() / "image";
  std::filesystem::remove_all(image);
  std::filesystem::copy(directory.data(), image, std::filesystem::copy_options::recursive);
  ExpectStored(image.string(), models, when);
}

absl::StatusOr<std::unique_ptr<Store>> Start(const std::string& data_dir, FaultPlan& plan) {
  auto opened = OpenSqliteStore(std::make_shared<FaultyDisk>(data_dir, plan), FaultyVfs(plan));
  if (!opened.ok()) return opened;
  const absl::Status loaded = (*opened)->Load().status();
  if (!loaded.ok()) return loaded;
  return opened;
}

// The script with one failure. False: it ended before.
bool RunWith(Failure failure, int64_t operation) {
  const std::string when = "operation " + std::to_string(operation);
  const TemporaryDirectory directory;
  FaultPlan plan;
  plan.failure = failure;
  plan.left = operation;
  auto store = Start(directory.data(), plan);
  if (!store.ok()) {
    ExpectRefusal(store.status(), failure, when + " of the start, " + plan.trace.back());
    store = Start(directory.data(), plan);
  }
  EXPECT_TRUE(store.ok()) << when << ": " << store.status();
  if (!store.ok()) return false;
  Scene scene;
  scene.store = store->get();
  bool checked = plan.struck;
  for (size_t i = 0; i < Script().size(); ++i) {
    absl::Status status = Script()[i](scene);
    if (plan.struck && !checked) {
      checked = true;
      const std::string step = when + " in step " + std::to_string(i);
      if (!status.ok()) ExpectRefusal(status, failure, step);
      ExpectImage(directory, {scene.model}, step);
      if (!status.ok()) status = Script()[i](scene);
    }
    EXPECT_TRUE(status.ok()) << when << ", step " << i << ": " << status;
  }
  store->reset();
  ExpectStored(directory.data(), {scene.model}, when + ", at the end");
  return plan.struck;
}

class StoreFaultsTest : public ::testing::TestWithParam<Failure> {};

TEST_P(StoreFaultsTest, EachOperationInTurn) {
  int64_t operation = 0;
  while (RunWith(GetParam(), operation) && !HasFatalFailure()) ++operation;
  RecordProperty("operations", static_cast<int>(operation));
  // Far from all of them if the seams were bypassed.
  EXPECT_GT(operation, 30);
}

std::string FailureName(const ::testing::TestParamInfo<Failure>& info) {
  switch (info.param) {
    case Failure::kFull:
      return "Full";
    case Failure::kBroken:
      return "Broken";
    default:
      return "HalfWritten";
  }
}
INSTANTIATE_TEST_SUITE_P(Each, StoreFaultsTest,
                         ::testing::Values(Failure::kFull, Failure::kBroken, Failure::kHalfWritten),
                         FailureName);

// The disk stays broken while the caller cleans up after the failure.
TEST(StoreLastingFaultsTest, NoRecordIsLeftWithoutItsTensor) {
  bool struck = true;
  for (int64_t operation = 0; struck; ++operation) {
    const std::string when = "operation " + std::to_string(operation);
    const TemporaryDirectory directory;
    FaultPlan plan;
    auto store = Start(directory.data(), plan);
    ASSERT_TRUE(store.ok()) << store.status();
    JobRecord job = FullJob("j", 1);
    job.weights = {};
    job.result_header = "result";
    const auto blob = WriteBlob(**store, Pattern(job.result_header, 1000));
    ASSERT_TRUE(blob.ok());
    job.result = *blob;
    plan.failure = Failure::kBroken;
    plan.left = operation;
    plan.lasting = true;
    const absl::Status status = (*store)->PutJob(job);
    struck = plan.struck;
    EXPECT_EQ(status.ok(), !struck) << when << ": " << status;
    Model before;
    Model after;
    after.jobs["j"] = job;
    if (struck) {
      ExpectRefusal(status, plan.failure, when);
      (*store)->DeleteBlob(job.result);
      // It was not promised: a crash now may keep it or not, but whole.
      ExpectImage(directory, {before, after}, when);
      plan.failure = Failure::kNone;
      JobRecord other = FullJob("k", 2);
      other.weights = {};
      other.result = {};
      EXPECT_TRUE((*store)->PutJob(other).ok()) << when;
      before.jobs["k"] = other;
      ExpectImage(directory, {before}, when + ", after the next call");
    }
    store->reset();
    ExpectStored(directory.data(), {struck ? before : after}, when + ", at the end");
  }
}

TEST(StoreOrderTest, BytesAreSyncedBeforeTheyAreNamed) {
  const TemporaryDirectory directory;
  FaultPlan plan;
  const auto store = Start(directory.data(), plan);
  ASSERT_TRUE(store.ok());
  plan.trace.clear();
  ASSERT_TRUE(WriteBlob(**store, Pattern("x", 10)).ok());
  EXPECT_EQ(plan.trace, (std::vector<std::string>{"open", "write", "write", "fsync", "rename",
                                                  "open", "fsync"}));
  plan.trace.clear();
  ASSERT_TRUE((*store)->PutJob(FullJob("j", 1)).ok());
  ASSERT_FALSE(plan.trace.empty());
  EXPECT_EQ(plan.trace.back(), "sqlite sync");
}

// Full until the reserve has made room.
class FullDisk final : public Disk {
 public:
  FullDisk(std::string root, FaultPlan& plan) : Disk(std::move(root)), plan_(plan) {}

  void Fill() {
    plan_.failure = Failure::kFull;
    plan_.left = 0;
    plan_.lasting = true;
    plan_.struck = false;
    full_ = true;
  }
  // As if everything but the reserve had been in the way.
  bool full() const { return full_; }

 protected:
  int Interfere(absl::string_view call, size_t& /*bytes*/) override {
    if (call == "unlink" && full_) {
      plan_.failure = Failure::kNone;
      full_ = false;
    }
    const bool takes_room = call == "write" || call == "fallocate";
    return full_ && takes_room ? ENOSPC : 0;
  }

 private:
  FaultPlan& plan_;
  bool full_ = false;
};

TEST(StoreFullDiskTest, DeletionsMakeRoom) {
  const TemporaryDirectory directory;
  const std::filesystem::path reserve = std::filesystem::path(directory.data()) / "reserve";
  FaultPlan plan;
  const auto disk = std::make_shared<FullDisk>(directory.data(), plan);
  auto store = OpenSqliteStore(disk, FaultyVfs(plan));
  ASSERT_TRUE(store.ok() && (*store)->Load().ok());
  ASSERT_EQ(std::filesystem::file_size(reserve), 1 << 20);
  JobRecord job = FullJob("j", 1);
  job.weights = {};
  const auto blob = WriteBlob(**store, Pattern("result", 1000));
  ASSERT_TRUE(blob.ok());
  job.result = *blob;
  ASSERT_TRUE((*store)->PutJob(job).ok());

  disk->Fill();
  ExpectRefusal((*store)->PutJob(FullJob("k", 2)), Failure::kFull, "another record");
  ASSERT_TRUE(disk->full());
  EXPECT_TRUE((*store)->DeleteJob("j").ok());
  EXPECT_FALSE(std::filesystem::exists(reserve));
  // What the blob gives back fills it again.
  (*store)->DeleteBlob(*blob);
  EXPECT_EQ(std::filesystem::file_size(reserve), 1 << 20);
  store->reset();
  ExpectStored(directory.data(), {Model()}, "at the end");
}

TEST(StoreFullDiskTest, StartsOnAFullDisk) {
  const TemporaryDirectory directory;
  FaultPlan plan;
  ASSERT_TRUE(Start(directory.data(), plan).ok());
  std::filesystem::remove(std::filesystem::path(directory.data()) / "reserve");
  const auto disk = std::make_shared<FullDisk>(directory.data(), plan);
  disk->Fill();
  plan.failure = Failure::kNone;
  EXPECT_TRUE(OpenSqliteStore(disk, nullptr).ok());
}

// Interrupted every other time, and never given more than a few bytes.
class SlowDisk final : public Disk {
 public:
  using Disk::Disk;

 protected:
  int Interfere(absl::string_view /*call*/, size_t& bytes) override {
    bytes = std::min<size_t>(bytes, 50'000);
    interrupted_ = !interrupted_;
    return interrupted_ ? EINTR : 0;
  }

 private:
  bool interrupted_ = false;
};

TEST(StoreSlowDiskTest, InterruptedAndShortCallsGoOn) {
  const TemporaryDirectory directory;
  const auto store = OpenSqliteStore(std::make_shared<SlowDisk>(directory.data()), nullptr);
  ASSERT_TRUE(store.ok()) << store.status();
  ASSERT_TRUE((*store)->Load().ok());
  const std::vector<std::byte> bytes = Pattern("slow", (int64_t{1} << 20) + 7);
  const auto blob = WriteBlob(**store, bytes);
  ASSERT_TRUE(blob.ok()) << blob.status();
  const auto read = ReadBlob(**store, *blob);
  EXPECT_TRUE(read.ok() && *read == bytes);
}

TEST(DiskErrorTest, SpaceAndQuotaAreToldFromOtherFailures) {
  for (const int error : {ENOSPC, EDQUOT, EFBIG}) {
    const absl::Status status = DiskError("tensors/x", "write", error);
    EXPECT_TRUE(absl::IsResourceExhausted(status)) << status;
    EXPECT_EQ(base::RetryAfterOf(status), base::kRetrySoon);
  }
  for (const int error : {EIO, EROFS, EACCES, EMFILE, ENOENT}) {
    const absl::Status status = DiskError("tensors/x", "write", error);
    EXPECT_TRUE(absl::IsUnavailable(status)) << status;
    EXPECT_EQ(base::RetryAfterOf(status), base::kRetrySoon);
  }
  const absl::Status full = DiskError("tensors/x", "write", ENOSPC);
  EXPECT_CONTAINS(full.message(), "tensors/x: write: No space left on device");
}

}  // namespace
}  // namespace certiq::server::testing
