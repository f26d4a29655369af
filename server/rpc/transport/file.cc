#include "rpc/transport/file.h"

#include <sys/stat.h>

#include <cerrno>
#include <fstream>
#include <system_error>

#include "absl/status/status.h"

namespace certiq::server {
namespace {

constexpr int64_t kMaxBytes = int64_t{1} << 20;

int64_t Nanoseconds(const timespec& time) {
  return int64_t{time.tv_sec} * 1'000'000'000 + time.tv_nsec;
}

}  // namespace

std::optional<FileStamp> StampOf(const std::string& path) {
  struct stat found = {};
  if (stat(path.c_str(), &found) != 0) return std::nullopt;
  return FileStamp{.device = found.st_dev,
                   .inode = found.st_ino,
                   .size = found.st_size,
                   .modified_ns = Nanoseconds(found.st_mtim),
                   .changed_ns = Nanoseconds(found.st_ctim)};
}

absl::StatusOr<std::string> ReadSmallFile(const std::string& path) {
  struct stat found = {};
  if (stat(path.c_str(), &found) != 0) {
    return absl::NotFoundError(std::generic_category().message(errno));
  }
  // Opening a named pipe would block until there is a writer.
  if (!S_ISREG(found.st_mode)) return absl::InvalidArgumentError("expected a regular file");
  std::ifstream file(path, std::ios::binary);
  if (!file) return absl::InvalidArgumentError("cannot be opened; may this user read it?");
  std::string text(static_cast<size_t>(kMaxBytes) + 1, '\0');
  file.read(text.data(), static_cast<std::streamsize>(text.size()));
  text.resize(static_cast<size_t>(file.gcount()));
  if (!file.eof()) return absl::InvalidArgumentError("expected at most 1 MiB that can be read");
  return text;
}

bool OpenToOthers(const std::string& path) {
  struct stat found = {};
  return stat(path.c_str(), &found) == 0 && (found.st_mode & (S_IROTH | S_IWOTH)) != 0;
}

}  // namespace certiq::server
