#include "certiq/atomic_file.h"

#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <cstdio>
#include <filesystem>
#include <random>
#include <string>
#include <system_error>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "base/status_macros.h"

namespace certiq {
namespace {

absl::Status ErrnoError(int error, const char* doing, const std::string& path) {
  return absl::ErrnoToStatus(error, absl::StrCat(path, ": ", doing));
}

int CloseQuietly(int fd) { return fd >= 0 ? close(fd) : 0; }

}  // namespace

absl::StatusOr<AtomicFile> AtomicFile::Create(const std::string& path) {
  namespace fs = std::filesystem;
  if (path.empty()) return absl::InvalidArgumentError("output path: expected a name, got \"\"");
  AtomicFile file;
  file.path_ = path;
  file.target_ = path;
  std::error_code error;
  const fs::file_status kind = fs::status(path, error);
  if (fs::exists(kind)) {
    // Renaming over a device such as /dev/null would replace it for everybody.
    if (!fs::is_regular_file(kind)) {
      return absl::InvalidArgumentError(
          absl::StrCat(path, ": expected a regular file or a new name, found ",
                       fs::is_directory(kind) ? "a folder" : "a special file"));
    }
    const fs::path resolved = fs::canonical(path, error);
    if (!error) file.target_ = resolved.string();
  }
  struct stat existing = {};
  const bool replaces = stat(file.target_.c_str(), &existing) == 0;
  if (replaces && access(file.target_.c_str(), W_OK) != 0) {
    // The rename would succeed; a file that was made read-only should stay what it is.
    return ErrnoError(errno, "cannot be overwritten", path);
  }
  std::random_device random;
  for (int attempt = 0; attempt < 16; ++attempt) {
    const std::string name = absl::StrFormat("%s.%08x.tmp", file.target_, random());
    // O_EXCL rather than mkstemp: the usual mode and umask apply.
    file.fd_ = open(name.c_str(), O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC, 0666);
    if (file.fd_ >= 0) {
      file.temporary_ = name;
      if (replaces && fchmod(file.fd_, existing.st_mode & 07777) != 0) {
        return ErrnoError(errno, "cannot take over the mode of the file it replaces", path);
      }
      return file;
    }
    if (errno != EEXIST) return ErrnoError(errno, "cannot be written", path);
  }
  return absl::AlreadyExistsError(absl::StrCat(path, ": no free temporary name beside it"));
}

absl::Status AtomicFile::CheckWritable(const std::string& path) { return Create(path).status(); }

AtomicFile::AtomicFile(AtomicFile&& other) noexcept { *this = std::move(other); }

AtomicFile& AtomicFile::operator=(AtomicFile&& other) noexcept {
  if (this == &other) return *this;
  Discard();
  path_ = std::move(other.path_);
  target_ = std::move(other.target_);
  temporary_ = std::exchange(other.temporary_, std::string());
  fd_ = std::exchange(other.fd_, -1);
  return *this;
}

AtomicFile::~AtomicFile() { Discard(); }

void AtomicFile::Discard() {
  CloseQuietly(std::exchange(fd_, -1));
  if (!temporary_.empty()) unlink(temporary_.c_str());
  temporary_.clear();
}

absl::Status AtomicFile::Write(absl::string_view data) {
  while (!data.empty()) {
    const ssize_t written = write(fd_, data.data(), data.size());
    if (written < 0) {
      if (errno == EINTR) continue;
      return ErrnoError(errno, "writing", path_);
    }
    data.remove_prefix(static_cast<size_t>(written));
  }
  return absl::OkStatus();
}

absl::Status AtomicFile::Flush() {
  if (fsync(fd_) != 0) return ErrnoError(errno, "flushing to disk", path_);
  return absl::OkStatus();
}

absl::Status AtomicFile::Commit() {
  RETURN_IF_ERROR(Flush());
  if (CloseQuietly(std::exchange(fd_, -1)) != 0) return ErrnoError(errno, "closing", path_);
  if (std::rename(temporary_.c_str(), target_.c_str()) != 0) {
    return ErrnoError(errno, "renaming the complete file", path_);
  }
  temporary_.clear();
  // The name itself is durable only once the folder is; some file systems cannot say, and the
  // file is complete either way.
  const std::string folder = std::filesystem::path(target_).parent_path().string();
  const int fd = open(folder.empty() ? "." : folder.c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC);
  if (fd >= 0) fsync(fd);
  CloseQuietly(fd);
  return absl::OkStatus();
}

}  // namespace certiq
