// Configuration files that may change while the server runs: content, stamp, permissions.

#ifndef CERTIQ_RPC_TRANSPORT_FILE_H_
#define CERTIQ_RPC_TRANSPORT_FILE_H_

#include <cstdint>
#include <functional>
#include <optional>
#include <string>

#include "absl/status/statusor.h"

namespace certiq::server {

// Reports a warning to the operator. Called from any thread; does not block.
using Warn = std::function<void(const std::string& message)>;

// Differs between two states of a file, whether it was written to, replaced, or a symlink of its
// path now points elsewhere.
struct FileStamp {
  uint64_t device = 0;
  uint64_t inode = 0;
  int64_t size = 0;
  int64_t modified_ns = 0;
  int64_t changed_ns = 0;

  bool operator==(const FileStamp&) const = default;
};

// Absent if there is no such file.
std::optional<FileStamp> StampOf(const std::string& path);

// The content of a regular file of at most 1 MiB. Errors give the reason without the path.
absl::StatusOr<std::string> ReadSmallFile(const std::string& path);

// True if users other than owner and group may read or write the file.
bool OpenToOthers(const std::string& path);

}  // namespace certiq::server

#endif  // CERTIQ_RPC_TRANSPORT_FILE_H_
