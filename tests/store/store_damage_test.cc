// What lies on disk is not what was written: found, with the file's name, and never returned. And
// who may open a data directory.

#include <gtest/gtest.h>
#include <sqlite3.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <memory>
#include <optional>
#include <set>
#include <utility>

#include "absl/strings/str_cat.h"
#include "base/status.h"
#include "store/file_blobs.h"
#include "store/storage.h"
#include "store/store_examples.h"
#include "support/text.h"

namespace certiq::server::testing {
namespace {

constexpr size_t kHeader = 16;
constexpr size_t kBlock = kBlobBlockBytes;
constexpr size_t kSum = 8;
// The byte of SQLite's header that says which versions may write the file.
constexpr size_t kWriteVersion = 18;

class StoreDamageTest : public ::testing::Test {
 protected:
  void SetUp() override { Open(); }

  void Open() {
    storage_.reset();
    auto opened = OpenStorage(directory_.data());
    ASSERT_TRUE(opened.ok()) << opened.status();
    storage_.emplace(*std::move(opened));
  }
  void Close() { storage_.reset(); }

  Catalog& catalog() { return *storage_->catalog; }
  Blobs& blobs() { return *storage_->blobs; }

  // A start of the server; closed again.
  absl::StatusOr<StoredState> Reload() {
    Close();
    const auto opened = OpenStorage(directory_.data());
    if (!opened.ok()) return opened.status();
    return StartUp(*opened, "replica", 1);
  }

  // Adds the records of the tests below.
  void AddRecords(const BlobRef& result = {}) {
    calibration_ = FullCalibration("calibration");
    job_ = FullJob("j", 1);
    if (!result.name().empty()) *job_.mutable_result()->mutable_blob() = result;
    ASSERT_TRUE(catalog().AddCalibration(calibration_).ok());
    ASSERT_TRUE(catalog().AddJob(job_).ok());
  }

  std::filesystem::path FileOf(const BlobRef& blob) const {
    return std::filesystem::path(directory_.data()) / kBlobDirectory / blob.name();
  }
  std::filesystem::path Database() const {
    return std::filesystem::path(directory_.data()) / "state.db";
  }

  BlobRef MustWrite(std::span<const std::byte> bytes) {
    const auto blob = WriteBlob(blobs(), bytes);
    EXPECT_TRUE(blob.ok()) << blob.status();
    return blob.ok() ? *blob : BlobRef();
  }

  void ExpectLost(const BlobRef& blob, const std::string& what) {
    const absl::Status status = ReadBlob(blobs(), blob).status();
    EXPECT_TRUE(absl::IsDataLoss(status)) << what << ": " << status;
    EXPECT_CONTAINS(status.message(), "tensors/" + blob.name());
  }

  // Runs SQL on the closed database.
  void Sql(const std::string& sql) {
    Close();
    sqlite3* database = nullptr;
    ASSERT_EQ(sqlite3_open(Database().c_str(), &database), SQLITE_OK);
    EXPECT_EQ(sqlite3_exec(database, sql.c_str(), nullptr, nullptr, nullptr), SQLITE_OK)
        << sqlite3_errmsg(database);
    sqlite3_close(database);
  }

  TemporaryDirectory directory_;
  std::optional<Storage> storage_;
  CalibrationRecord calibration_;
  JobRecord job_;
};

TEST_F(StoreDamageTest, EveryChangedByteOfATensorIsFound) {
  const std::vector<std::byte> bytes = Pattern("flip", 2 * kBlobBlockBytes + 1000);
  const BlobRef blob = MustWrite(bytes);
  const std::string whole = ReadFile(FileOf(blob));
  ASSERT_EQ(whole.size(), kHeader + bytes.size() + 3 * kSum);
  std::set<size_t> positions;
  // Headers, and both sides of every border between block and checksum.
  for (size_t i = 0; i < kHeader + 4; ++i) positions.insert(i);
  for (size_t i = 0; i < kSum + 8; ++i) {
    positions.insert(kHeader + kBlock - 4 + i);
    positions.insert(kHeader + 2 * kBlock + kSum - 4 + i);
    positions.insert(whole.size() - 1 - i);
  }
  for (size_t i = 0; i < whole.size(); i += 61'001) positions.insert(i);
  for (const size_t position : positions) {
    std::string changed = whole;
    changed[position] = static_cast<char>(changed[position] ^ (1 << (position % 8)));
    WriteFile(FileOf(blob), changed);
    ExpectLost(blob, "byte " + std::to_string(position));
    if (position < kHeader) continue;
    // Blocks beside it are read as before.
    const size_t damaged = (position - kHeader) / (kBlock + kSum);
    auto reader = blobs().Open(blob);
    ASSERT_TRUE(reader.ok()) << reader.status();
    for (size_t block = 0; block < 3; ++block) {
      std::vector<std::byte> part(900);
      const absl::Status status = (*reader)->Read(static_cast<int64_t>(block * kBlock + 50), part);
      EXPECT_EQ(status.ok(), block != damaged) << "byte " << position << ", block " << block;
      if (!status.ok()) continue;
      EXPECT_TRUE(std::equal(part.begin(), part.end(),
                             bytes.begin() + static_cast<ptrdiff_t>(block * kBlock + 50)));
    }
  }
  WriteFile(FileOf(blob), whole);
  const auto read = ReadBlob(blobs(), blob);
  EXPECT_TRUE(read.ok() && *read == bytes);
}

TEST_F(StoreDamageTest, EveryByteOfASmallTensorIsGuarded) {
  const BlobRef blob = MustWrite(Pattern("small", 100));
  const std::string whole = ReadFile(FileOf(blob));
  for (size_t position = 0; position < whole.size(); ++position) {
    for (int bit = 0; bit < 8; ++bit) {
      std::string changed = whole;
      changed[position] = static_cast<char>(changed[position] ^ (1 << bit));
      WriteFile(FileOf(blob), changed);
      ExpectLost(blob, "bit");
    }
  }
}

TEST_F(StoreDamageTest, WrongLengthIsFound) {
  for (const int64_t size : {int64_t{0}, int64_t{1}, kBlobBlockBytes, 2 * kBlobBlockBytes + 3}) {
    const BlobRef blob = MustWrite(Pattern("length", size));
    const std::string whole = ReadFile(FileOf(blob));
    for (const size_t cut : {size_t{1}, kSum - 1, kSum, kSum + 1, kHeader, kSum + kHeader, kBlock,
                             kBlock + kSum, whole.size()}) {
      if (cut > whole.size()) continue;
      WriteFile(FileOf(blob), whole.substr(0, whole.size() - cut));
      ExpectLost(blob, "cut by " + std::to_string(cut));
    }
    for (const size_t more : {size_t{1}, kSum, kSum + 1, kBlock, kBlock + kSum}) {
      WriteFile(FileOf(blob), whole + std::string(more, '\0'));
      ExpectLost(blob, "longer by " + std::to_string(more));
    }
  }
}

TEST_F(StoreDamageTest, CutWhileOpenIsFound) {
  const BlobRef blob = MustWrite(Pattern("cut", 2 * kBlobBlockBytes));
  auto reader = blobs().Open(blob);
  ASSERT_TRUE(reader.ok());
  std::filesystem::resize_file(FileOf(blob), kHeader + kBlock + kSum + 10);
  std::vector<std::byte> part(10);
  EXPECT_TRUE((*reader)->Read(0, part).ok());
  const absl::Status status = (*reader)->Read(kBlobBlockBytes, part);
  EXPECT_TRUE(absl::IsDataLoss(status)) << status;
  EXPECT_CONTAINS(status.message(), "tensors/" + blob.name());
}

TEST_F(StoreDamageTest, SwappedFilesAndBlocksAreFound) {
  // The same bytes: only names and places tell them apart.
  const std::vector<std::byte> zeros(2 * kBlock);
  const BlobRef a = MustWrite(zeros);
  const BlobRef b = MustWrite(zeros);
  std::filesystem::rename(FileOf(a), FileOf(a).string() + "x");
  std::filesystem::rename(FileOf(b), FileOf(a));
  std::filesystem::rename(FileOf(a).string() + "x", FileOf(b));
  ExpectLost(a, "swapped files");
  ExpectLost(b, "swapped files");

  const BlobRef c = MustWrite(zeros);
  const std::string whole = ReadFile(FileOf(c));
  const size_t stride = kBlock + kSum;
  WriteFile(FileOf(c), whole.substr(0, kHeader) + whole.substr(kHeader + stride) +
                           whole.substr(kHeader, stride));
  ExpectLost(c, "swapped blocks");
  // A block of another tensor in the same place.
  const BlobRef d = MustWrite(zeros);
  const std::string other = ReadFile(FileOf(d));
  WriteFile(FileOf(c), whole.substr(0, kHeader + stride) + other.substr(kHeader + stride));
  ExpectLost(c, "a block of another file");
}

TEST_F(StoreDamageTest, NoChangedByteOfTheDatabaseChangesARecord) {
  AddRecords();
  Close();
  const std::string whole = ReadFile(Database());
  int found = 0;
  for (size_t position = 0; position < whole.size(); position += position < 110 ? 1 : 89) {
    std::string changed = whole;
    changed[position] = static_cast<char>(changed[position] ^ (1 << (position / 7 % 8)));
    WriteFile(Database(), changed);
    for (const char* suffix : {"-wal", "-journal"}) {
      std::filesystem::remove(Database().string() + suffix);
    }
    const auto state = Reload();
    if (state.ok()) {
      // In a place that holds nothing.
      EXPECT_TRUE(Same(state->calibrations, std::vector{calibration_})) << position;
      EXPECT_TRUE(Same(state->jobs, std::vector{job_})) << position;
      continue;
    }
    ++found;
    EXPECT_CONTAINS(state.status().message(), "state.db");
    // What a later SQLite wrote may be read, not written.
    if (position == kWriteVersion && absl::IsUnavailable(state.status())) continue;
    EXPECT_TRUE(absl::IsDataLoss(state.status()) || absl::IsFailedPrecondition(state.status()))
        << position << ": " << state.status();
  }
  EXPECT_GT(found, 20);
}

TEST_F(StoreDamageTest, ChangedValuesAreFound) {
  std::vector<std::string> changes = {
      "DELETE FROM calibration_labels WHERE label = 'same'",
      "UPDATE calibration_labels SET label = 'other' WHERE label = 'same'",
      "INSERT INTO calibration_labels VALUES ('calibration', 'more')",
  };
  // Every column that a query believes, and what guards the record.
  for (const char* column :
       {"number", "state", "priority", "create_time", "deadline_time", "expire_time", "checksum"}) {
    changes.push_back(absl::StrCat("UPDATE jobs SET ", column, " = ", column, " - 1"));
  }
  for (const char* column : {"id", "tenant", "request_id", "calibration_id", "owner"}) {
    changes.push_back(absl::StrCat("UPDATE jobs SET ", column, " = 'other'"));
  }
  for (const char* column : {"create_time", "expire_time", "checksum"}) {
    changes.push_back(absl::StrCat("UPDATE calibrations SET ", column, " = 5"));
  }
  for (const char* column : {"tenant", "request_id"}) {
    changes.push_back(absl::StrCat("UPDATE calibrations SET ", column, " = 'other'"));
  }
  for (const char* table : {"jobs", "calibrations"}) {
    changes.push_back(absl::StrCat("UPDATE ", table, " SET body = CAST(body || x'00' AS BLOB)"));
    changes.push_back(absl::StrCat("UPDATE ", table, " SET body = x''"));
  }
  for (const std::string& change : changes) {
    const TemporaryDirectory intact;
    Open();
    AddRecords();
    Close();
    std::filesystem::copy(Database(), intact.path() / "state.db");
    Sql(change);
    const absl::Status status = Reload().status();
    EXPECT_TRUE(absl::IsDataLoss(status)) << change << ": " << status;
    EXPECT_CONTAINS(status.message(), "state.db");
    std::filesystem::copy(intact.path() / "state.db", Database(),
                          std::filesystem::copy_options::overwrite_existing);
    EXPECT_TRUE(Reload().ok()) << change;
  }
}

TEST_F(StoreDamageTest, ARunningServerFindsChangedRecordsToo) {
  AddRecords();
  for (const char* change :
       {"UPDATE jobs SET priority = 5", "UPDATE calibrations SET checksum = checksum + 1"}) {
    Sql(change);
  }
  Open();
  const std::string tenant = job_.tenant();
  EXPECT_TRUE(absl::IsDataLoss(catalog().FindJob(tenant, "j").status()));
  EXPECT_TRUE(absl::IsDataLoss(catalog().Jobs({tenant, {}, {}}, std::nullopt, 5).status()));
  EXPECT_TRUE(absl::IsDataLoss(catalog().RemoveJob(tenant, "j").status()));
  EXPECT_TRUE(absl::IsDataLoss(catalog().FindCalibration(tenant, "calibration").status()));
  EXPECT_TRUE(absl::IsDataLoss(catalog().RemoveCalibration(tenant, "calibration").status()));
  // The catalog stays usable.
  EXPECT_TRUE(catalog().AddCalibration(OpenCalibration("next")).ok());
}

TEST_F(StoreDamageTest, GarbageForADatabaseIsDataLossAndStays) {
  const BlobRef blob = MustWrite(Pattern("stays", 10));
  Close();
  std::string garbage(100'000, 'x');
  WriteFile(Database(), garbage);
  const absl::Status status = Reload().status();
  EXPECT_TRUE(absl::IsDataLoss(status)) << status;
  EXPECT_CONTAINS(status.message(), "state.db");
  EXPECT_TRUE(ReadFile(Database()) == garbage);
  EXPECT_TRUE(std::filesystem::exists(FileOf(blob)));
}

TEST_F(StoreDamageTest, DamagedRecordsKeepTheirTensors) {
  const BlobRef result = MustWrite(Pattern("kept", 10));
  AddRecords(result);
  Sql("UPDATE jobs SET checksum = checksum + 1");
  EXPECT_TRUE(absl::IsDataLoss(Reload().status()));
  EXPECT_TRUE(std::filesystem::exists(FileOf(result)));
}

TEST_F(StoreDamageTest, MissingTableIsDataLoss) {
  Sql("DROP TABLE jobs");
  const absl::Status status = Reload().status();
  EXPECT_TRUE(absl::IsDataLoss(status)) << status;
  EXPECT_CONTAINS(status.message(), "state.db");
}

TEST_F(StoreDamageTest, NewerAndForeignDatabasesAreRefusedUntouched) {
  Sql("PRAGMA user_version = 3");
  std::string before = ReadFile(Database());
  absl::Status status = Reload().status();
  EXPECT_TRUE(absl::IsFailedPrecondition(status)) << status;
  EXPECT_CONTAINS(status.message(), "newer");
  EXPECT_TRUE(ReadFile(Database()) == before);

  std::filesystem::remove(Database());
  Sql("CREATE TABLE notes (text)");
  before = ReadFile(Database());
  status = Reload().status();
  EXPECT_TRUE(absl::IsFailedPrecondition(status)) << status;
  EXPECT_CONTAINS(status.message(), "another program");
  EXPECT_TRUE(ReadFile(Database()) == before);
}

TEST_F(StoreDamageTest, LeftoversGoAndStrangersStay) {
  const BlobRef uncommitted = MustWrite(Pattern("left", 10));
  {
    auto writer = blobs().Create();
    ASSERT_TRUE(writer.ok());
    ASSERT_TRUE((*writer)->Append(Pattern("vanishes", 2 * kBlobBlockBytes)).ok());
    EXPECT_EQ(NamesIn(directory_.data() + "/incoming").size(), 1u);
  }
  EXPECT_TRUE(NamesIn(directory_.data() + "/incoming").empty());
  const std::string name(32, 'a');
  const std::string folder(32, 'b');
  for (const char* directory : {"/incoming/", "/tensors/"}) {
    WriteFile(directory_.data() + directory + name, "of a crash");
    WriteFile(directory_.data() + directory + "notes.txt", "not the store's");
    std::filesystem::create_directory(directory_.data() + directory + folder);
  }
  ASSERT_TRUE(Reload().ok());
  for (const char* directory : {"/incoming", "/tensors"}) {
    EXPECT_EQ(NamesIn(directory_.data() + directory),
              (std::vector<std::string>{folder, "notes.txt"}));
  }
}

TEST_F(StoreDamageTest, DirectoryBelongsToOneProcess) {
  const absl::Status second = OpenStorage(directory_.data()).status();
  EXPECT_TRUE(absl::IsFailedPrecondition(second)) << second;
  EXPECT_CONTAINS(second.message(), "in use");
  // Refused without harm to the first.
  AddRecords();
  const pid_t child = fork();
  if (child == 0) {
    _exit(absl::IsFailedPrecondition(OpenStorage(directory_.data()).status()) ? 0 : 1);
  }
  int status = -1;
  ASSERT_EQ(waitpid(child, &status, 0), child);
  EXPECT_TRUE(WIFEXITED(status) && WEXITSTATUS(status) == 0);
  EXPECT_EQ(Reload()->jobs.size(), 1u);
}

TEST_F(StoreDamageTest, FilesAreForTheOwnerAlone) {
  MustWrite(Pattern("mine", 10));
  AddRecords();
  int files = 0;
  for (const auto& entry : std::filesystem::recursive_directory_iterator(directory_.data())) {
    struct stat status = {};
    ASSERT_EQ(stat(entry.path().c_str(), &status), 0);
    EXPECT_EQ(status.st_mode & 077, 0u) << entry.path();
    ++files;
  }
  EXPECT_GE(files, 6);
}

TEST(StoreDirectoryTest, ParentsAreNotMade) {
  const TemporaryDirectory directory;
  const absl::Status status = OpenStorage(directory.data() + "/not/there").status();
  EXPECT_TRUE(absl::IsUnavailable(status)) << status;
  EXPECT_EQ(base::RetryAfterOf(status), base::kRetrySoon);
  WriteFile(directory.data(), "a file");
  EXPECT_FALSE(OpenStorage(directory.data()).ok());
}

}  // namespace
}  // namespace certiq::server::testing
