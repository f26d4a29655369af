// A disk that fails once, at every operation of a store's life in turn.

#include "store/store_faults.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cerrno>
#include <filesystem>
#include <memory>
#include <utility>

#include "base/status.h"
#include "store/storage.h"
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

absl::StatusOr<Storage> Start(const std::string& data_dir, FaultPlan& plan) {
  auto storage = OpenStorage(std::make_shared<FaultyDisk>(data_dir, plan), FaultyVfs(plan));
  if (!storage.ok()) return storage;
  const absl::Status started = StartUp(*storage, "replica", 1).status();
  if (!started.ok()) return started;
  return storage;
}

void Close(absl::StatusOr<Storage>& storage) { storage = absl::UnknownError("closed"); }

// The script with one failure. False: it ended before.
bool RunWith(Failure failure, int64_t operation) {
  const std::string when = "operation " + std::to_string(operation);
  const TemporaryDirectory directory;
  FaultPlan plan;
  plan.failure = failure;
  plan.left = operation;
  auto storage = Start(directory.data(), plan);
  if (!storage.ok()) {
    ExpectRefusal(storage.status(), failure, when + " of the start, " + plan.trace.back());
    storage = Start(directory.data(), plan);
  }
  EXPECT_TRUE(storage.ok()) << when << ": " << storage.status();
  if (!storage.ok()) return false;
  Scene scene;
  scene.catalog = storage->catalog.get();
  scene.storage = &*storage;
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
  EXPECT_TRUE(storage->catalog->settled()) << when;
  Close(storage);
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

INSTANTIATE_TEST_SUITE_P(Each, StoreFaultsTest,
                         ::testing::Values(Failure::kFull, Failure::kBroken, Failure::kHalfWritten),
                         FailureName);

// A finalized calibration without sums, and a queued job of it whose weights are in the store.
absl::Status AddCalibration(Scene& scene) {
  CalibrationRecord calibration = FullCalibration("calibration");
  calibration.clear_sums();
  const auto added = scene.catalog->AddCalibration(calibration);
  if (added.ok()) scene.model.calibrations[added->id()] = *added;
  return added.status();
}
JobRecord JobWithWeights(const Storage& storage, const std::string& id) {
  JobRecord job = QueuedJob(id);
  const auto weights = WriteBlob(*storage.blobs, Pattern(job.weights_sha256(), 1000));
  EXPECT_TRUE(weights.ok()) << weights.status();
  if (weights.ok()) *job.mutable_weights() = *weights;
  return job;
}

// The disk stays broken while the caller cleans up after the failure.
TEST(StoreLastingFaultsTest, NoRecordIsLeftWithoutItsTensor) {
  bool struck = true;
  int unsettled = 0;
  int untold_numbers = 0;
  for (int64_t operation = 0; struck; ++operation) {
    const std::string when = "operation " + std::to_string(operation);
    const TemporaryDirectory directory;
    FaultPlan plan;
    auto storage = Start(directory.data(), plan);
    ASSERT_TRUE(storage.ok()) << storage.status();
    Catalog& catalog = *storage->catalog;
    Scene scene{.catalog = &catalog, .storage = &*storage, .model = {}, .blobs = {}};
    ASSERT_TRUE(AddCalibration(scene).ok());
    const JobRecord job = JobWithWeights(*storage, "j");
    const JobRecord other = JobWithWeights(*storage, "k");
    plan.failure = Failure::kBroken;
    plan.left = operation;
    plan.lasting = true;
    const auto added = catalog.AddJob(job);
    struck = plan.struck;
    // Once it is in the database it cannot be taken back, whether its number is told or not.
    const bool untold = struck && added.ok();
    untold_numbers += untold ? 1 : 0;
    Model before = scene.model;
    Model after = scene.model;
    after.jobs["j"] = job;
    after.jobs["j"].set_number(1);
    if (untold) {
      EXPECT_TRUE(std::any_of(plan.trace.begin(), plan.trace.end(), [](const std::string& call) {
        return call == "pwrite" || call == "fdatasync";
      })) << when;
      ExpectImage(directory, {after}, when);
      plan.failure = Failure::kNone;
      const auto next = catalog.AddJob(other);
      ASSERT_TRUE(next.ok()) << when << ": " << next.status();
      after.jobs["k"] = next->job;
    } else if (struck) {
      ExpectRefusal(added.status(), plan.failure, when);
      unsettled += catalog.settled() ? 0 : 1;
      storage->Forget(job.weights());
      // It was not promised: a crash now may keep it or not, but whole.
      ExpectImage(directory, {before, after}, when);
      plan.failure = Failure::kNone;
      const auto next = catalog.AddJob(other);
      ASSERT_TRUE(next.ok()) << when << ": " << next.status();
      EXPECT_TRUE(catalog.settled()) << when;
      before.jobs["k"] = next->job;
      ExpectImage(directory, {before}, when + ", after the next call");
    }
    Close(storage);
    ExpectStored(directory.data(), {struck && !untold ? before : after}, when + ", at the end");
  }
  EXPECT_GT(untold_numbers, 0);
  // Else nothing shows that an unsettled catalog keeps its blobs.
  EXPECT_GT(unsettled, 0);
}

TEST(StoreOrderTest, BytesAreSyncedBeforeTheyAreNamed) {
  const TemporaryDirectory directory;
  FaultPlan plan;
  const auto storage = Start(directory.data(), plan);
  ASSERT_TRUE(storage.ok());
  plan.trace.clear();
  ASSERT_TRUE(WriteBlob(*storage->blobs, Pattern("x", 10)).ok());
  EXPECT_EQ(plan.trace, (std::vector<std::string>{"open", "write", "write", "fsync", "rename",
                                                  "open", "fsync"}));
  // Each write of the catalog ends with a sync, and then says beside it how far it came.
  Scene scene;
  scene.catalog = storage->catalog.get();
  scene.storage = &*storage;
  for (const Step step : Script()) {
    plan.trace.clear();
    ASSERT_TRUE(step(scene).ok());
    if (std::any_of(plan.trace.begin(), plan.trace.end(),
                    [](const std::string& call) { return call == "sqlite write"; })) {
      ASSERT_GE(plan.trace.size(), 3u);
      EXPECT_EQ(std::vector<std::string>(plan.trace.end() - 3, plan.trace.end()),
                (std::vector<std::string>{"sqlite sync", "pwrite", "fdatasync"}));
    }
  }
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
  auto storage = OpenStorage(disk, FaultyVfs(plan));
  ASSERT_TRUE(storage.ok() && StartUp(*storage, "replica", 1).ok());
  ASSERT_EQ(std::filesystem::file_size(reserve), 1 << 20);
  Catalog& catalog = *storage->catalog;
  Scene scene{.catalog = &catalog, .storage = &*storage, .model = {}, .blobs = {}};
  ASSERT_TRUE(AddCalibration(scene).ok());
  const std::string tenant = QueuedJob("j").tenant();
  for (const bool job : {true, false}) {
    const std::string what = job ? "job" : "calibration";
    BlobRef blob;
    if (job) {
      const JobRecord queued = JobWithWeights(*storage, "j");
      ASSERT_TRUE(catalog.AddJob(queued).ok());
      blob = queued.weights();
      ASSERT_TRUE(catalog.CancelJob(tenant, "j", absl::CancelledError("as asked"), 1).ok());
    } else {
      const auto sums = WriteBlob(*storage->blobs, Pattern("sums", 1000));
      ASSERT_TRUE(sums.ok());
      blob = *sums;
    }
    disk->Fill();
    ExpectRefusal(catalog.AddCalibration(OpenCalibration("k")).status(), Failure::kFull,
                  "another record");
    ASSERT_TRUE(disk->full());
    const absl::Status removed = job ? catalog.RemoveJob(tenant, "j").status()
                                     : catalog.RemoveCalibration(tenant, "calibration").status();
    EXPECT_TRUE(removed.ok()) << what << ": " << removed;
    EXPECT_FALSE(std::filesystem::exists(reserve)) << what;
    // What the blob gives back fills it again.
    storage->Forget(blob);
    EXPECT_EQ(std::filesystem::file_size(reserve), 1 << 20) << what;
  }
  Close(storage);
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
  EXPECT_TRUE(OpenStorage(disk, nullptr).ok());
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
  const auto storage = OpenStorage(std::make_shared<SlowDisk>(directory.data()), nullptr);
  ASSERT_TRUE(storage.ok()) << storage.status();
  ASSERT_TRUE(StartUp(*storage, "replica", 1).ok());
  const std::vector<std::byte> bytes = Pattern("slow", (int64_t{1} << 20) + 7);
  const auto blob = WriteBlob(*storage->blobs, bytes);
  ASSERT_TRUE(blob.ok()) << blob.status();
  const auto read = ReadBlob(*storage->blobs, *blob);
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
