// Atomic files, which appear complete or not at all.
#ifndef CERTIQ_CLIENT_CPP_INCLUDE_CERTIQ_ATOMIC_FILE_H_
#define CERTIQ_CLIENT_CPP_INCLUDE_CERTIQ_ATOMIC_FILE_H_

#include <string>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"

namespace certiq {

// A new file, invisible under its name until Commit(). Not thread-safe. Destroyed without a
// Commit() it leaves no trace. A symbolic link is followed; what it points to is replaced. A path
// that exists and is no regular file (a folder, a device) is rejected.
class AtomicFile {
 public:
  // Creates the temporary file beside `path`. Errors name the path: NOT_FOUND (no such folder),
  // PERMISSION_DENIED, INVALID_ARGUMENT (not a regular file), …
  static absl::StatusOr<AtomicFile> Create(const std::string& path);

  // OK where Create() would succeed now; leaves nothing behind.
  static absl::Status CheckWritable(const std::string& path);

  AtomicFile(AtomicFile&& other) noexcept;
  AtomicFile& operator=(AtomicFile&& other) noexcept;
  ~AtomicFile();

  // Appends. RESOURCE_EXHAUSTED where the disk is full.
  absl::Status Write(absl::string_view data);

  // Brings the bytes to disk, still under the temporary name: what remains can hardly fail.
  absl::Status Flush();

  // Flushes and renames the file; to be called at most once.
  absl::Status Commit();

 private:
  AtomicFile() = default;
  void Discard();

  std::string path_;       // As given, for errors.
  std::string target_;     // With links resolved.
  std::string temporary_;  // Empty: nothing to remove.
  int fd_ = -1;
};

}  // namespace certiq

#endif  // CERTIQ_CLIENT_CPP_INCLUDE_CERTIQ_ATOMIC_FILE_H_
