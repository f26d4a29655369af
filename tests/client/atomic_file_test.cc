#include "certiq/atomic_file.h"

#include <sys/stat.h>
#include <unistd.h>

#include <filesystem>
#include <string>
#include <utility>

#include "gtest/gtest.h"
#include "temporary_folder.h"
#include "test_util.h"

namespace certiq {
namespace {

using testing::Contains;
using testing::Names;
using testing::ReadFile;
using testing::TemporaryFolder;
using testing::WriteFile;

TEST(AtomicFileTest, AppearsOnlyOnCommit) {
  const TemporaryFolder folder;
  absl::StatusOr<AtomicFile> file = AtomicFile::Create(folder.Path("f"));
  ASSERT_TRUE(file.ok());
  ASSERT_TRUE(file->Write("one ").ok());
  AtomicFile moved = *std::move(file);
  ASSERT_TRUE(moved.Write("two").ok());
  ASSERT_TRUE(moved.Flush().ok());
  EXPECT_FALSE(std::filesystem::exists(folder.Path("f")));
  ASSERT_TRUE(moved.Commit().ok());
  EXPECT_EQ(ReadFile(folder.Path("f")), "one two");
  EXPECT_EQ(folder.Names(), Names({"f"}));
}

TEST(AtomicFileTest, LeavesNoTraceWithoutCommit) {
  const TemporaryFolder folder;
  WriteFile(folder.Path("f"), "old");
  {
    absl::StatusOr<AtomicFile> file = AtomicFile::Create(folder.Path("f"));
    ASSERT_TRUE(file.ok());
    ASSERT_TRUE(file->Write("new").ok());
  }
  EXPECT_EQ(ReadFile(folder.Path("f")), "old");
  EXPECT_EQ(folder.Names(), Names({"f"}));
}

TEST(AtomicFileTest, CheckWritableLeavesNothing) {
  const TemporaryFolder folder;
  EXPECT_TRUE(AtomicFile::CheckWritable(folder.Path("f")).ok());
  EXPECT_TRUE(folder.Names().empty());
}

TEST(AtomicFileTest, KeepsTheModeOfWhatItReplaces) {
  const TemporaryFolder folder;
  WriteFile(folder.Path("f"), "old");
  ASSERT_EQ(chmod(folder.Path("f").c_str(), 0640), 0);
  absl::StatusOr<AtomicFile> file = AtomicFile::Create(folder.Path("f"));
  ASSERT_TRUE(file.ok());
  ASSERT_TRUE(file->Commit().ok());
  struct stat info = {};
  ASSERT_EQ(stat(folder.Path("f").c_str(), &info), 0);
  EXPECT_EQ(info.st_mode & 07777U, 0640U);
}

TEST(AtomicFileTest, FollowsALink) {
  const TemporaryFolder folder;
  WriteFile(folder.Path("target"), "old");
  ASSERT_EQ(symlink("target", folder.Path("link").c_str()), 0);
  absl::StatusOr<AtomicFile> file = AtomicFile::Create(folder.Path("link"));
  ASSERT_TRUE(file.ok());
  ASSERT_TRUE(file->Write("new").ok());
  ASSERT_TRUE(file->Commit().ok());
  EXPECT_TRUE(std::filesystem::is_symlink(folder.Path("link")));
  EXPECT_EQ(ReadFile(folder.Path("target")), "new");
}

TEST(AtomicFileTest, RejectsWhatItCannotReplace) {
  const TemporaryFolder folder;
  EXPECT_EQ(AtomicFile::CheckWritable("").code(), absl::StatusCode::kInvalidArgument);
  EXPECT_EQ(AtomicFile::CheckWritable(folder.Path("no/f")).code(), absl::StatusCode::kNotFound);
  EXPECT_TRUE(Contains(AtomicFile::CheckWritable(folder.Path("")).message(), "a folder"));
  EXPECT_TRUE(Contains(AtomicFile::CheckWritable("/dev/null").message(),
                       "/dev/null: expected a regular file"));
  WriteFile(folder.Path("f"), "file");
  EXPECT_FALSE(AtomicFile::CheckWritable(folder.Path("f/g")).ok());
}

}  // namespace
}  // namespace certiq
