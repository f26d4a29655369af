// Records that go back in time: a log that is damaged or gone, a database of another moment. A
// start finds all that was acknowledged, or says that it does not.

#include <gtest/gtest.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <filesystem>
#include <memory>
#include <optional>
#include <set>
#include <string>
#include <vector>

#include "absl/strings/str_cat.h"
#include "store/commits.h"
#include "store/storage.h"
#include "store/store_examples.h"
#include "store/store_script.h"
#include "support/text.h"

namespace certiq::server::testing {
namespace {

constexpr size_t kLogHeader = 32;
constexpr size_t kFrameHeader = 24;
constexpr size_t kPage = 4096;

class StoreLossTest : public ::testing::Test {
 protected:
  std::filesystem::path Data() const { return directory_.data(); }
  std::filesystem::path Database() const { return Data() / "state.db"; }
  std::filesystem::path Log() const { return Data() / "state.db-wal"; }

  // Runs steps of the script in a process that is killed after them, and keeps what it left under
  // `name`. The log is not emptied.
  void Live(const std::string& name, size_t begin, size_t end) {
    const pid_t child = fork();
    if (child == 0) {
      const auto storage = OpenStorage(Data());
      if (!storage.ok() || !StartUp(*storage, "replica", 1).ok()) _exit(1);
      Scene scene;
      scene.catalog = storage->catalog.get();
      scene.storage = &*storage;
      for (size_t i = begin; i < end; ++i) {
        if (!Script()[i](scene).ok()) _exit(2);
      }
      std::filesystem::copy(Data(), Kept(name), std::filesystem::copy_options::recursive);
      _exit(0);
    }
    int status = -1;
    ASSERT_EQ(waitpid(child, &status, 0), child);
    ASSERT_TRUE(WIFEXITED(status) && WEXITSTATUS(status) == 0) << status;
  }
  std::filesystem::path Kept(const std::string& name) const { return directory_.path() / name; }
  void Restore(const std::string& name) {
    std::filesystem::remove_all(Data());
    std::filesystem::copy(Kept(name), Data(), std::filesystem::copy_options::recursive);
  }

  // A calibration with sums, so that there is a tensor, and ones without until the log is long.
  void LiveThrough(const std::string& name, int records) {
    const pid_t child = fork();
    if (child == 0) {
      const auto storage = OpenStorage(Data());
      if (!storage.ok() || !StartUp(*storage, "replica", 1).ok()) _exit(1);
      for (int i = 0; i < records; ++i) {
        CalibrationRecord record = FullCalibration(absl::StrCat(name, "-", i));
        record.set_request_id(record.id());
        const auto sums = WriteBlob(*storage->blobs, Pattern(record.id(), 100));
        if (!sums.ok()) _exit(2);
        *record.mutable_sums() = *sums;
        if (!storage->catalog->AddCalibration(record).ok()) _exit(3);
      }
      std::filesystem::copy(Data(), Kept(name), std::filesystem::copy_options::recursive);
      _exit(0);
    }
    int status = -1;
    ASSERT_EQ(waitpid(child, &status, 0), child);
    ASSERT_TRUE(WIFEXITED(status) && WEXITSTATUS(status) == 0) << status;
    Restore(name);
  }

  absl::StatusOr<StoredState> Start(const std::string& accepted = "") {
    const auto storage = OpenStorage(Data(), accepted);
    if (!storage.ok()) return storage.status();
    return StartUp(*storage, "replica", 1);
  }
  // The code that the start asks for. Nothing is removed, and no byte of the database changes.
  std::string ExpectRefused(const std::string& because) {
    const std::vector<std::string> tensors = NamesIn(Data() / "tensors");
    const std::string database = ReadFile(Database());
    const std::string log = LogBytes();
    const absl::Status status = Start().status();
    EXPECT_TRUE(absl::IsDataLoss(status)) << status;
    EXPECT_CONTAINS(status.message(), because);
    EXPECT_CONTAINS(status.message(), "Restore a backup");
    EXPECT_EQ(NamesIn(Data() / "tensors"), tensors);
    EXPECT_TRUE(ReadFile(Database()) == database);
    EXPECT_TRUE(LogBytes() == log);
    return CodeIn(status);
  }
  std::string LogBytes() const {
    return std::filesystem::exists(Log()) ? ReadFile(Log()) : "there is none";
  }
  static std::string CodeIn(const absl::Status& status) {
    const std::string message(status.message());
    const std::string flag = "--accept_loss ";
    const size_t at = message.find(flag);
    return at == std::string::npos ? "" : message.substr(at + flag.size(), 8);
  }

  TemporaryDirectory directory_;
};

TEST_F(StoreLossTest, AnyChangedByteOfTheLog) {
  LiveThrough("lived", 6);
  const std::string whole = ReadFile(Log());
  ASSERT_GT(whole.size(), kLogHeader + 12 * (kFrameHeader + kPage));
  std::set<size_t> positions;
  for (size_t i = 0; i < kLogHeader; ++i) positions.insert(i);
  size_t frames = 0;
  for (size_t at = kLogHeader; at < whole.size(); at += kFrameHeader + kPage, ++frames) {
    // Each byte of the first headers, then one after the other; the page's head, its middle and its
    // end, and others beside them.
    for (size_t i = 0; i < kFrameHeader; ++i) {
      if (frames < 2 || i % 8 == frames % 8) positions.insert(at + i);
    }
    for (const size_t in_page : {size_t{0}, 100 + frames, kPage / 2, kPage - 1}) {
      positions.insert(at + kFrameHeader + in_page);
    }
  }
  int refused = 0;
  for (const size_t position : positions) {
    Restore("lived");
    std::string changed = whole;
    changed[position] = static_cast<char>(changed[position] ^ (1 << (position % 8)));
    WriteFile(Log(), changed);
    const auto state = Start();
    if (state.ok()) {
      // Nobody reads this byte.
      EXPECT_EQ(state->calibrations.size(), 6u) << position;
      continue;
    }
    ++refused;
    EXPECT_TRUE(absl::IsDataLoss(state.status())) << position << ": " << state.status();
    EXPECT_CONTAINS(state.status().message(), "state.db");
    EXPECT_EQ(NamesIn(Data() / "tensors").size(), 6u) << position;
    EXPECT_TRUE(ReadFile(Log()) == changed) << position;
  }
  EXPECT_GT(refused, static_cast<int>(positions.size() * 9 / 10));
}

// A byte of each frame in turn, of a log that was written into the database and goes on.
TEST_F(StoreLossTest, AChangedByteOfALogThatWentRound) {
  LiveThrough("lived", 320);
  const std::string whole = ReadFile(Log());
  ASSERT_GT(std::filesystem::file_size(Database()), 20 * kPage) << "the log was never written back";
  int refused = 0;
  int whole_again = 0;
  const size_t stride = kFrameHeader + kPage;
  for (size_t at = kLogHeader; at < whole.size(); at += 7 * stride) {
    Restore("lived");
    std::string changed = whole;
    changed[at + kFrameHeader + 50] = static_cast<char>(changed[at + kFrameHeader + 50] ^ 1);
    WriteFile(Log(), changed);
    const auto state = Start();
    (state.ok() ? whole_again : refused) += 1;
    // Frames of an earlier round are nobody's.
    if (state.ok()) {
      EXPECT_EQ(state->calibrations.size(), 320u) << at;
    } else {
      EXPECT_TRUE(absl::IsDataLoss(state.status())) << at << ": " << state.status();
    }
  }
  EXPECT_GT(refused, 0);
  EXPECT_GT(whole_again, 0);
}

TEST_F(StoreLossTest, ALogThatIsGoneOrCut) {
  LiveThrough("lived", 3);
  const std::string whole = ReadFile(Log());
  std::filesystem::remove(Log());
  ExpectRefused("state.db has lost changes that were acknowledged");
  EXPECT_FALSE(std::filesystem::exists(Log()));
  for (const size_t left : {kLogHeader, whole.size() / 2, whole.size() - 1}) {
    Restore("lived");
    WriteFile(Log(), whole.substr(0, left));
    ExpectRefused("state.db has lost changes that were acknowledged");
  }
  // The right one, put back.
  Restore("lived");
  EXPECT_EQ(Start()->calibrations.size(), 3u);
}

TEST_F(StoreLossTest, ADatabaseOfAnotherMoment) {
  LiveThrough("early", 3);
  ASSERT_TRUE(Start().ok());
  std::filesystem::copy(Database(), Kept("early.db"));
  LiveThrough("late", 3);
  // Under the log of now, and without it.
  std::filesystem::remove(Database());
  std::filesystem::copy(Kept("early.db"), Database());
  EXPECT_EQ(Start()->calibrations.size(), 6u) << "the log holds all that came after it";
  Restore("late");
  std::filesystem::remove(Database());
  std::filesystem::copy(Kept("early.db"), Database());
  std::filesystem::remove(Log());
  ExpectRefused("state.db has lost changes that were acknowledged");
  for (const bool there : {false, true}) {
    Restore("late");
    std::filesystem::remove(Database());
    if (there) WriteFile(Database(), "");
    const std::string log = ReadFile(Log());
    const absl::Status status = Start().status();
    EXPECT_TRUE(absl::IsDataLoss(status)) << status;
    EXPECT_CONTAINS(status.message(), "none of them is in it");
    EXPECT_TRUE(ReadFile(Log()) == log);
    EXPECT_EQ(NamesIn(Data() / "tensors").size(), 6u);
  }
}

// The log holds the number of now, on top of records of then.
TEST_F(StoreLossTest, ALogOverAnOlderDatabase) {
  LiveThrough("first", 1);
  ASSERT_TRUE(Start().ok());
  std::filesystem::copy(Database(), Kept("older.db"));
  LiveThrough("second", 60);
  ASSERT_TRUE(Start().ok());
  // All of it is in the database now; the log begins anew.
  LiveThrough("third", 1);
  std::filesystem::remove(Database());
  std::filesystem::copy(Kept("older.db"), Database());
  const absl::Status status = Start().status();
  EXPECT_TRUE(absl::IsDataLoss(status)) << status;
  EXPECT_CONTAINS(status.message(), "state.db");
  EXPECT_EQ(NamesIn(Data() / "tensors").size(), 62u);
}

TEST_F(StoreLossTest, ADatabaseOfAnotherDirectory) {
  LiveThrough("one", 2);
  std::filesystem::remove_all(Data());
  LiveThrough("other", 5);
  ASSERT_TRUE(Start().ok());
  std::filesystem::copy(Database(), Kept("other.db"));
  Restore("one");
  std::filesystem::remove(Log());
  std::filesystem::remove(Database());
  std::filesystem::copy(Kept("other.db"), Database());
  ExpectRefused("put there from elsewhere");
}

TEST_F(StoreLossTest, TheFileOfCommitsIsNeeded) {
  LiveThrough("lived", 2);
  std::filesystem::remove(Data() / "commits");
  ExpectRefused("the file commits");
  // One copy is enough, both are not whole.
  for (const size_t at : {size_t{20}, size_t{45}, kPage + 20, kPage + 45}) {
    Restore("lived");
    std::string commits = ReadFile(Data() / "commits");
    ASSERT_EQ(commits.size(), 2 * kPage);
    commits[at] = static_cast<char>(commits[at] ^ 8);
    WriteFile(Data() / "commits", commits);
    const auto state = Start();
    ASSERT_TRUE(state.ok()) << at << ": " << state.status();
    EXPECT_EQ(state->calibrations.size(), 2u);
  }
  Restore("lived");
  std::string commits = ReadFile(Data() / "commits");
  commits[45] = static_cast<char>(commits[45] ^ 8);
  commits[kPage + 45] = static_cast<char>(commits[kPage + 45] ^ 8);
  WriteFile(Data() / "commits", commits);
  ExpectRefused("both of its copies are damaged");
}

TEST_F(StoreLossTest, AnAcceptedLossRemovesNothing) {
  LiveThrough("lived", 4);
  std::string log = ReadFile(Log());
  const size_t late =
      kLogHeader + (log.size() / (kFrameHeader + kPage) - 2) * (kFrameHeader + kPage);
  log[late + 200] = static_cast<char>(log[late + 200] ^ 1);
  WriteFile(Log(), log);
  const std::vector<std::string> tensors = NamesIn(Data() / "tensors");
  const std::string code = ExpectRefused("state.db has lost changes");
  ASSERT_EQ(code.size(), 8u);
  const absl::Status other = Start("00000000").status();
  EXPECT_TRUE(absl::IsDataLoss(other)) << other;
  EXPECT_CONTAINS(other.message(), "--accept_loss 00000000 is for another loss");

  auto state = Start(code);
  ASSERT_TRUE(state.ok()) << state.status();
  const size_t left = state->calibrations.size();
  EXPECT_LT(left, 4u);
  EXPECT_GT(left, 0u);
  std::vector<std::string> all = NamesIn(Data() / "tensors");
  EXPECT_EQ(all.size(), left);
  for (const std::string& name : NamesIn(Data() / "quarantine")) all.push_back(name);
  std::sort(all.begin(), all.end());
  EXPECT_EQ(all, tensors);
  // It is over: with the flag and without it, the next starts find what is there.
  for (const std::string& flag : {code, std::string()}) {
    state = Start(flag);
    ASSERT_TRUE(state.ok()) << state.status();
    EXPECT_EQ(state->calibrations.size(), left);
    EXPECT_EQ(NamesIn(Data() / "quarantine").size(), 4 - left);
  }
  // The flag that stayed accepts no other loss, and the old log is no log of the new database.
  LiveThrough("on", 2);
  std::filesystem::remove(Log());
  EXPECT_TRUE(absl::IsDataLoss(Start(code).status()));
}

TEST_F(StoreLossTest, ADatabaseThatIsGoneCanBeAccepted) {
  LiveThrough("lived", 2);
  const std::vector<std::string> tensors = NamesIn(Data() / "tensors");
  std::filesystem::remove(Database());
  const std::string code = CodeIn(Start().status());
  const auto state = Start(code);
  ASSERT_TRUE(state.ok()) << state.status();
  EXPECT_TRUE(state->calibrations.empty());
  EXPECT_EQ(NamesIn(Data() / "quarantine"), tensors);
  EXPECT_TRUE(Start().ok());
}

TEST_F(StoreLossTest, WhatACrashKeptFromBeingToldIsNoLoss) {
  LiveThrough("lived", 2);
  const std::string before = ReadFile(Data() / "commits");
  LiveThrough("on", 1);
  WriteFile(Data() / "commits", before);
  auto state = Start();
  ASSERT_TRUE(state.ok()) << state.status();
  EXPECT_EQ(state->calibrations.size(), 3u);
  // Whoever has seen it since relies on it.
  EXPECT_NE(ReadFile(Data() / "commits"), before);
}

// Every record that there ever was, counted by the triggers as the file counts them.
TEST_F(StoreLossTest, TheScriptIsCounted) {
  Live("scripted", 0, Script().size());
  Restore("scripted");
  EXPECT_TRUE(Start().ok());
  Restore("scripted");
  WriteFile(Log(), ReadFile(Log()).substr(0, kLogHeader + 3 * (kFrameHeader + kPage)));
  ExpectRefused("state.db has lost changes");
}

}  // namespace
}  // namespace certiq::server::testing
