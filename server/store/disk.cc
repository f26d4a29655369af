#include "store/disk.h"

#include <fcntl.h>
#include <sys/file.h>
#include <sys/stat.h>
#include <sys/statvfs.h>
#include <unistd.h>

#include <cerrno>
#include <filesystem>
#include <system_error>

#include "absl/strings/str_cat.h"
#include "base/status.h"

namespace certiq::server {

absl::Status DiskError(const std::string& name, absl::string_view what, int error) {
  const bool full = error == ENOSPC || error == EDQUOT || error == EFBIG;
  absl::Status status(full ? absl::StatusCode::kResourceExhausted : absl::StatusCode::kUnavailable,
                      absl::StrCat(name.empty() ? "data directory" : name, ": ", what, ": ",
                                   std::generic_category().message(error)));
  base::SetRetryAfter(status, base::kRetrySoon);
  return status;
}

int Disk::Interfere(absl::string_view /*call*/, size_t& /*bytes*/) { return 0; }

ssize_t Disk::Try(absl::string_view name, size_t bytes, absl::FunctionRef<ssize_t(size_t)> call) {
  for (;;) {
    size_t allowed = bytes;
    ssize_t result = -1;
    if (const int fault = Interfere(name, allowed); fault != 0) {
      errno = fault;
    } else {
      result = call(allowed);
    }
    if (result >= 0 || errno != EINTR) return result;
  }
}

std::string Disk::Path(const std::string& name) const {
  return name.empty() ? root_ : absl::StrCat(root_, "/", name);
}

absl::Status Disk::MakeDirectory(const std::string& name) {
  if (Try("mkdir", 0, [&](size_t) { return mkdir(Path(name).c_str(), 0700); }) < 0) {
    return errno == EEXIST ? absl::OkStatus() : DiskError(name, "make directory", errno);
  }
  return SyncDirectory(name.empty() ? ".." : "");
}

absl::StatusOr<std::vector<std::string>> Disk::List(const std::string& directory) {
  std::vector<std::string> names;
  const ssize_t result = Try("list", 0, [&](size_t) -> ssize_t {
    std::error_code error;
    names.clear();
    std::filesystem::directory_iterator entry(Path(directory), error);
    for (; !error && entry != std::filesystem::directory_iterator(); entry.increment(error)) {
      names.push_back(entry->path().filename().string());
    }
    errno = error.value();
    return error ? -1 : 0;
  });
  if (result < 0) return DiskError(directory, "list", errno);
  return names;
}

absl::StatusOr<std::optional<DiskEntry>> Disk::Look(const std::string& name) {
  struct stat status = {};
  const ssize_t result = Try("stat", 0, [&](size_t) {
    return fstatat(AT_FDCWD, Path(name).c_str(), &status, name.empty() ? 0 : AT_SYMLINK_NOFOLLOW);
  });
  if (result < 0 && errno == ENOENT) return std::optional<DiskEntry>();
  if (result < 0) return DiskError(name, "stat", errno);
  DiskEntry entry;
  if (S_ISREG(status.st_mode)) entry.kind = DiskEntry::Kind::kFile;
  if (S_ISDIR(status.st_mode)) entry.kind = DiskEntry::Kind::kDirectory;
  if (S_ISLNK(status.st_mode)) entry.kind = DiskEntry::Kind::kLink;
  entry.bytes = status.st_size;
  entry.owner = status.st_uid;
  entry.written_by_all = (status.st_mode & S_IWOTH) != 0;
  return std::optional<DiskEntry>(entry);
}

absl::StatusOr<int64_t> Disk::Room() {
  struct statvfs status = {};
  if (Try("statvfs", 0, [&](size_t) { return statvfs(root_.c_str(), &status); }) < 0) {
    return DiskError("", "ask for its room", errno);
  }
  return static_cast<int64_t>(status.f_bavail) * static_cast<int64_t>(status.f_frsize);
}

absl::Status Disk::SyncDirectory(const std::string& name) {
  absl::StatusOr<DiskFile> directory = Open(name, O_RDONLY | O_DIRECTORY);
  return directory.ok() ? Sync(*directory) : directory.status();
}

absl::StatusOr<DiskFile> Disk::Open(const std::string& name, int flags) {
  // The root may be a link, to which alone this says nothing.
  const int no_links = name.empty() ? 0 : O_NOFOLLOW;
  const ssize_t descriptor = Try("open", 0, [&](size_t) {
    return open(Path(name).c_str(), flags | no_links | O_CLOEXEC | O_NOCTTY, 0600);
  });
  if (descriptor >= 0) return DiskFile(static_cast<int>(descriptor), name);
  if (errno == ENOENT && (flags == O_RDONLY || flags == O_RDWR)) {
    return absl::NotFoundError(absl::StrCat(name, ": is not there"));
  }
  return DiskError(name, "open", errno);
}

absl::StatusOr<DiskFile> Disk::Create(const std::string& name) {
  return Open(name, O_WRONLY | O_CREAT | O_EXCL);
}

absl::StatusOr<DiskFile> Disk::OpenOrCreate(const std::string& name) {
  return Open(name, O_RDWR | O_CREAT);
}

absl::StatusOr<DiskFile> Disk::OpenToRead(const std::string& name) { return Open(name, O_RDONLY); }

absl::StatusOr<DiskFile> Disk::OpenToChange(const std::string& name) { return Open(name, O_RDWR); }

absl::Status Disk::Lock(const DiskFile& file) {
  if (Try("flock", 0, [&](size_t) { return flock(file.descriptor(), LOCK_EX | LOCK_NB); }) == 0) {
    return absl::OkStatus();
  }
  if (errno != EWOULDBLOCK) return DiskError(file.name(), "lock", errno);
  return absl::FailedPreconditionError(
      absl::StrCat(file.name(), ": the data directory is in use by another process"));
}

absl::Status Disk::Allocate(const DiskFile& file, int64_t bytes) {
  const ssize_t result = Try("fallocate", 0, [&](size_t) -> ssize_t {
    errno = posix_fallocate(file.descriptor(), 0, bytes);
    return errno == 0 ? 0 : -1;
  });
  return result == 0 ? absl::OkStatus() : DiskError(file.name(), "allocate", errno);
}

absl::Status Disk::Write(const DiskFile& file, std::span<const std::byte> bytes) {
  while (!bytes.empty()) {
    const ssize_t written = Try("write", bytes.size(), [&](size_t count) {
      return write(file.descriptor(), bytes.data(), count);
    });
    if (written < 0) return DiskError(file.name(), "write", errno);
    bytes = bytes.subspan(static_cast<size_t>(written));
  }
  return absl::OkStatus();
}

absl::Status Disk::WriteAt(const DiskFile& file, int64_t offset, std::span<const std::byte> bytes) {
  while (!bytes.empty()) {
    const ssize_t written = Try("pwrite", bytes.size(), [&](size_t count) {
      return pwrite(file.descriptor(), bytes.data(), count, offset);
    });
    if (written < 0) return DiskError(file.name(), "write", errno);
    bytes = bytes.subspan(static_cast<size_t>(written));
    offset += written;
  }
  return absl::OkStatus();
}

absl::Status Disk::Sync(const DiskFile& file) {
  if (Try("fsync", 0, [&](size_t) { return fsync(file.descriptor()); }) == 0) {
    return absl::OkStatus();
  }
  return DiskError(file.name(), "sync", errno);
}

absl::Status Disk::SyncData(const DiskFile& file) {
  if (Try("fdatasync", 0, [&](size_t) { return fdatasync(file.descriptor()); }) == 0) {
    return absl::OkStatus();
  }
  return DiskError(file.name(), "sync", errno);
}

absl::StatusOr<int64_t> Disk::Size(const DiskFile& file) {
  struct stat status = {};
  if (Try("fstat", 0, [&](size_t) { return fstat(file.descriptor(), &status); }) == 0) {
    return static_cast<int64_t>(status.st_size);
  }
  return DiskError(file.name(), "stat", errno);
}

absl::Status Disk::Read(const DiskFile& file, int64_t offset, std::span<std::byte> to) {
  while (!to.empty()) {
    const ssize_t read = Try("pread", to.size(), [&](size_t count) {
      return pread(file.descriptor(), to.data(), count, offset);
    });
    if (read < 0) return DiskError(file.name(), "read", errno);
    if (read == 0) return absl::DataLossError(absl::StrCat(file.name(), ": ends too early"));
    to = to.subspan(static_cast<size_t>(read));
    offset += read;
  }
  return absl::OkStatus();
}

absl::Status Disk::Rename(const std::string& from, const std::string& to) {
  if (Try("rename", 0, [&](size_t) { return rename(Path(from).c_str(), Path(to).c_str()); }) == 0) {
    return absl::OkStatus();
  }
  return DiskError(from, absl::StrCat("rename to ", to), errno);
}

absl::Status Disk::Remove(const std::string& name) {
  if (Try("unlink", 0, [&](size_t) { return unlink(Path(name).c_str()); }) == 0 ||
      errno == ENOENT) {
    return absl::OkStatus();
  }
  return DiskError(name, "remove", errno);
}

}  // namespace certiq::server
