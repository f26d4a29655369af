// Whose directory it is: what a start accepts, and that it touches nothing of what it refuses.

#include "store/data_dir.h"

#include <gtest/gtest.h>
#include <sqlite3.h>
#include <sys/stat.h>
#include <unistd.h>

#include <filesystem>
#include <map>
#include <string>
#include <vector>

#include "absl/strings/str_cat.h"
#include "store/storage.h"
#include "store/store_examples.h"
#include "support/text.h"

namespace certiq::server::testing {
namespace {

const std::string kBlobName(32, '7');

class DataDirTest : public ::testing::Test {
 protected:
  std::filesystem::path Data() const { return directory_.data(); }

  // Writes a file, and the folders that it takes.
  void Put(const std::string& name, const std::string& bytes) {
    std::filesystem::create_directories((Data() / name).parent_path());
    WriteFile(Data() / name, bytes);
  }
  void Folder(const std::string& name) { std::filesystem::create_directories(Data() / name); }
  // Runs SQL on state.db. The log stays, as if the process had been killed.
  void Sql(const std::string& sql) {
    Folder("");
    sqlite3* database = nullptr;
    ASSERT_EQ(sqlite3_open((Data() / "state.db").c_str(), &database), SQLITE_OK);
    sqlite3_db_config(database, SQLITE_DBCONFIG_NO_CKPT_ON_CLOSE, 1, nullptr);
    EXPECT_EQ(sqlite3_exec(database, sql.c_str(), nullptr, nullptr, nullptr), SQLITE_OK)
        << sqlite3_errmsg(database);
    sqlite3_close(database);
  }
  // What a server leaves that has stored something.
  void Serve() {
    const auto storage = OpenStorage(Data());
    ASSERT_TRUE(storage.ok()) << storage.status();
    ASSERT_TRUE(StartUp(*storage, "replica", 1).ok());
    const auto sums = WriteBlob(*storage->blobs, Pattern("sums", 100));
    ASSERT_TRUE(sums.ok());
    CalibrationRecord record = FullCalibration("calibration");
    *record.mutable_sums() = *sums;
    ASSERT_TRUE(storage->catalog->AddCalibration(record).ok());
  }

  // Every entry: bytes of files, targets of links.
  std::map<std::string, std::string> Contents() const {
    std::map<std::string, std::string> contents;
    for (const auto& entry : std::filesystem::recursive_directory_iterator(Data())) {
      std::string& content = contents[entry.path().lexically_relative(Data()).string()];
      if (entry.is_symlink()) {
        content = absl::StrCat("-> ", std::filesystem::read_symlink(entry.path()).string());
      } else if (entry.is_regular_file()) {
        content = ReadFile(entry.path());
      }
    }
    return contents;
  }

  absl::StatusOr<std::vector<std::string>> Start() {
    const auto storage = OpenStorage(Data());
    if (!storage.ok()) return storage.status();
    const absl::Status started = StartUp(*storage, "replica", 1).status();
    if (!started.ok()) return started;
    return storage->warnings;
  }
  void ExpectRefused(const std::string& because) {
    const auto before = Contents();
    for (int start = 0; start < 2; ++start) {
      const absl::Status status = Start().status();
      EXPECT_TRUE(absl::IsFailedPrecondition(status)) << status;
      EXPECT_CONTAINS(status.message(), Data().string());
      EXPECT_CONTAINS(status.message(), because);
    }
    EXPECT_EQ(Contents(), before);
  }
  void ExpectServed() {
    const auto warnings = Start();
    ASSERT_TRUE(warnings.ok()) << warnings.status();
    EXPECT_EQ(*warnings, std::vector<std::string>{});
    EXPECT_TRUE(Start().ok());
  }

  TemporaryDirectory directory_;
};

TEST_F(DataDirTest, OneThatIsNotThereOrEmpty) {
  ExpectServed();
  std::filesystem::remove_all(Data());
  Folder("");
  ExpectServed();
  std::filesystem::remove_all(Data());
  Folder("lost+found");
  ExpectServed();
  EXPECT_TRUE(std::filesystem::exists(Data() / "lost+found"));
}

TEST_F(DataDirTest, OneOfSomebodyElseIsLeftAlone) {
  const std::vector<std::vector<std::string>> files = {
      {"thesis.tex"},
      {".hidden"},
      {"lost+found"},
      {"incoming/thesis.docx", "tensors/model.safetensors"},
      {"incoming/" + kBlobName},
      {"tensors/" + kBlobName},
      {"lock", "tensors/" + kBlobName},
      {"lock", "incoming/" + kBlobName, "reserve"},
      {"reserve"},
      {"commits"},
      {"commits.new"},
      {"state.db"},
      {"state.db", "lock", "commits", "reserve", "tensors/" + kBlobName},
      {"state.db-wal", "lock"},
      {"a", "b", "c", "d", "e", "f", "g"},
  };
  for (const std::vector<std::string>& some : files) {
    std::filesystem::remove_all(Data());
    for (const std::string& file : some) Put(file, "years of work");
    SCOPED_TRACE(some.back());
    ExpectRefused("not a data directory of certiq");
  }
  EXPECT_CONTAINS(Start().status().message(), "a, b, c, d, e and 2 more");
  for (const char* folder : {"tensors", "incoming", "photos", "state.db", "quarantine"}) {
    std::filesystem::remove_all(Data());
    Folder(folder);
    SCOPED_TRACE(folder);
    ExpectRefused("");
  }
}

TEST_F(DataDirTest, ADatabaseOfSomebodyElseIsLeftAlone) {
  const char* const databases[] = {
      "CREATE TABLE notes (text)",
      "CREATE TABLE notes (text); PRAGMA user_version = 1",
      "CREATE TABLE jobs (id, tenant, payload); PRAGMA user_version = 2",
      "CREATE TABLE jobs (id, tenant); CREATE TABLE calibrations (id); PRAGMA user_version = 1",
      "PRAGMA application_id = 17; PRAGMA user_version = 1",
      "PRAGMA journal_mode = WAL; CREATE TABLE notes (text)",
      "PRAGMA journal_mode = WAL; CREATE TABLE jobs (id); PRAGMA user_version = 1",
      "PRAGMA journal_mode = PERSIST; CREATE TABLE notes (text); INSERT INTO notes VALUES ('x')",
  };
  for (const char* const sql : databases) {
    for (const bool locked : {false, true}) {
      std::filesystem::remove_all(Data());
      Sql(sql);
      std::filesystem::remove(Data() / "state.db-shm");
      if (locked) Put("lock", "");
      Put("tensors/" + kBlobName, "years of work");
      SCOPED_TRACE(sql);
      ExpectRefused("not a data directory of certiq");
    }
  }
}

// What the first start leaves that is interrupted; AtEachOperationInTurn has the rest.
TEST_F(DataDirTest, AnInterruptedFirstStartGoesOn) {
  const std::vector<std::vector<std::string>> beginnings = {
      {"lock"},
      {"lock", "commits.new"},
      {"lock", "state.db"},
      // Of earlier versions, which began otherwise.
      {"lock", "tensors/", "incoming/"},
      {"lock", "tensors/", "incoming/", "state.db"},
  };
  for (const std::vector<std::string>& names : beginnings) {
    std::filesystem::remove_all(Data());
    for (const std::string& name : names) {
      if (name.back() == '/') {
        Folder(name);
      } else {
        Put(name, name == "commits.new" ? "cert" : "");
      }
    }
    SCOPED_TRACE(names.back());
    ExpectServed();
  }
}

TEST_F(DataDirTest, StrangersInOursStayAndAreNamed) {
  Serve();
  const std::vector<std::string> strangers = {"notes.txt", "tensors/model.safetensors",
                                              "incoming/thesis.docx", "old/state.db"};
  for (const std::string& name : strangers) Put(name, "years of work");
  Folder("incoming/" + kBlobName);
  Put("incoming/" + std::string(32, '8'), "of a crash");
  const auto warnings = Start();
  ASSERT_TRUE(warnings.ok()) << warnings.status();
  ASSERT_EQ(warnings->size(), 3u);
  EXPECT_CONTAINS((*warnings)[0], "notes.txt, old");
  EXPECT_CONTAINS((*warnings)[1], "model.safetensors");
  EXPECT_CONTAINS((*warnings)[2], "thesis.docx");
  for (const std::string& name : strangers) EXPECT_EQ(ReadFile(Data() / name), "years of work");
  EXPECT_EQ(NamesIn(Data() / "incoming"), (std::vector<std::string>{kBlobName, "thesis.docx"}));
}

TEST_F(DataDirTest, LinksInItAreRefused) {
  Serve();
  const auto whole = directory_.path() / "whole";
  std::filesystem::rename(Data(), whole);
  for (const std::string name : {"lock", "commits", "state.db", "reserve", "tensors", "incoming"}) {
    for (const bool leads_somewhere : {true, false}) {
      std::filesystem::remove_all(Data());
      std::filesystem::copy(whole, Data(), std::filesystem::copy_options::recursive);
      const auto moved = directory_.path() / "moved";
      std::filesystem::remove_all(moved);
      std::filesystem::rename(Data() / name, moved);
      if (!leads_somewhere) std::filesystem::remove_all(moved);
      std::filesystem::create_symlink(moved, Data() / name);
      SCOPED_TRACE(name);
      ExpectRefused(name + " is a symbolic link");
      EXPECT_EQ(std::filesystem::exists(moved), leads_somewhere);
    }
  }
  std::filesystem::remove_all(Data());
  std::filesystem::copy(whole, Data(), std::filesystem::copy_options::recursive);
  std::filesystem::create_symlink("/dev/null", Data() / "state.db-wal");
  ExpectRefused("state.db-wal is a symbolic link");
}

TEST_F(DataDirTest, TheDirectoryItselfMayBeALink) {
  const auto elsewhere = directory_.path() / "elsewhere";
  std::filesystem::create_directory(elsewhere);
  std::filesystem::create_symlink(elsewhere, Data());
  Serve();
  EXPECT_TRUE(std::filesystem::exists(elsewhere / "state.db"));
  ExpectServed();
  std::filesystem::remove(Data());
  std::filesystem::create_symlink(directory_.path() / "nowhere", Data());
  EXPECT_FALSE(Start().ok());
  EXPECT_FALSE(std::filesystem::exists(directory_.path() / "nowhere"));
}

TEST_F(DataDirTest, WhoElseMayWriteIsSaid) {
  Serve();
  // A volume of Kubernetes with an fsGroup.
  ASSERT_EQ(chmod(Data().c_str(), 02770), 0);
  ExpectServed();
  ASSERT_EQ(chmod(Data().c_str(), 0777), 0);
  ASSERT_EQ(chmod((Data() / "tensors").c_str(), 0777), 0);
  const auto warnings = Start();
  ASSERT_TRUE(warnings.ok()) << warnings.status();
  ASSERT_EQ(warnings->size(), 1u);
  EXPECT_CONTAINS(warnings->front(),
                  absl::StrCat("everyone on this machine may change: ", Data().string(), ", ",
                               Data().string(), "/tensors."));
}

TEST_F(DataDirTest, WhoseItIsIsSaid) {
  if (geteuid() != 0) GTEST_SKIP() << "giving files away takes root";
  Serve();
  ASSERT_EQ(chown((Data() / "state.db").c_str(), 12345, getegid()), 0);
  const auto warnings = Start();
  ASSERT_TRUE(warnings.ok()) << warnings.status();
  ASSERT_EQ(warnings->size(), 1u);
  EXPECT_CONTAINS(warnings->front(), "belongs neither to this server's user");
  EXPECT_CONTAINS(warnings->front(), "state.db");
}

}  // namespace
}  // namespace certiq::server::testing
