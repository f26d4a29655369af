// Small files that may change while the server runs, and what there is to say about them.

#ifndef CERTIQ_RPC_TRANSPORT_FILE_H_
#define CERTIQ_RPC_TRANSPORT_FILE_H_

#include <cstdint>
#include <functional>
#include <optional>
#include <string>

#include "absl/status/statusor.h"

namespace certiq::server {

// Told what whoever runs the server should see; from any thread, does not block.
using Warn = std::function<void(const std::string& message)>;

// Tells one state of a file from the next, whether it was written to, replaced, or a symlink on
// the way to it now points elsewhere.
struct FileStamp {
  uint64_t device = 0;
  uint64_t inode = 0;
  int64_t size = 0;
  int64_t modified_ns = 0;
  int64_t changed_ns = 0;

  bool operator==(const FileStamp&) const = default;
};

// Nothing where there is no such file.
std::optional<FileStamp> StampOf(const std::string& path);

// The whole of a regular file of at most 1 MiB; the error says why not, without the path.
absl::StatusOr<std::string> ReadSmallFile(const std::string& path);

// Whether users beside the owner and the group may read or write the file.
bool OpenToOthers(const std::string& path);

}  // namespace certiq::server

#endif  // CERTIQ_RPC_TRANSPORT_FILE_H_
