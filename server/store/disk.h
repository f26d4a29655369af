// The files of a data directory: POSIX calls that answer with a status.

#ifndef CERTIQ_STORE_DISK_H_
#define CERTIQ_STORE_DISK_H_

#include <sys/types.h>

#include <cstddef>
#include <cstdint>
#include <optional>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include "absl/functional/function_ref.h"
#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "base/file_descriptor.h"

namespace certiq::server {

// `error` is an errno. RESOURCE_EXHAUSTED where space or quota is used up, UNAVAILABLE otherwise;
// both with a retry delay. The message starts with `name`.
absl::Status DiskError(const std::string& name, absl::string_view what, int error);

// An open file, closed on destruction.
class DiskFile {
 public:
  DiskFile() = default;
  DiskFile(int descriptor, std::string name) : descriptor_(descriptor), name_(std::move(name)) {}

  int descriptor() const { return descriptor_.get(); }
  const std::string& name() const { return name_; }
  void Close() { descriptor_.Close(); }

 private:
  base::FileDescriptor descriptor_;
  std::string name_;
};

// What a name stands for.
struct DiskEntry {
  enum class Kind { kFile, kDirectory, kLink, kOther };
  Kind kind = Kind::kOther;
  int64_t bytes = 0;
  uint32_t owner = 0;
  bool written_by_all = false;
};

// Names are relative to `root`, in arguments and in messages; "" is the root itself, which may be a
// symbolic link. No other name may be one. Errors are DiskError's unless said otherwise.
// Thread-safe.
class Disk {
 public:
  explicit Disk(std::string root) : root_(std::move(root)) {}
  Disk(const Disk&) = delete;
  Disk& operator=(const Disk&) = delete;
  virtual ~Disk() = default;

  std::string Path(const std::string& name) const;

  // For the owner alone (0700), durably. No error where it is there.
  absl::Status MakeDirectory(const std::string& name);
  // Names of the entries, without "." and "..".
  absl::StatusOr<std::vector<std::string>> List(const std::string& directory);
  // What is under a name itself, not where a link leads; nothing where there is nothing. "" is the
  // directory that the root leads to.
  absl::StatusOr<std::optional<DiskEntry>> Look(const std::string& name);
  // Bytes that can be written yet, as the file system says.
  absl::StatusOr<int64_t> Room();
  // Makes creations, renames and removals in it durable.
  absl::Status SyncDirectory(const std::string& name);

  // Files are for the owner alone (0600). Must not be there yet.
  absl::StatusOr<DiskFile> Create(const std::string& name);
  absl::StatusOr<DiskFile> OpenOrCreate(const std::string& name);
  // NOT_FOUND where there is none.
  absl::StatusOr<DiskFile> OpenToRead(const std::string& name);
  // To read and to change. NOT_FOUND where there is none.
  absl::StatusOr<DiskFile> OpenToChange(const std::string& name);
  // Until the file is closed. FAILED_PRECONDITION where someone else holds it.
  absl::Status Lock(const DiskFile& file);

  // Takes the space of the first `bytes`, which read as zeros where nothing was written.
  absl::Status Allocate(const DiskFile& file, int64_t bytes);
  // Appends all of `bytes`.
  absl::Status Write(const DiskFile& file, std::span<const std::byte> bytes);
  // Writes all of `bytes` at `offset`.
  absl::Status WriteAt(const DiskFile& file, int64_t offset, std::span<const std::byte> bytes);
  absl::Status Sync(const DiskFile& file);
  // The same without what only tells when the file was changed.
  absl::Status SyncData(const DiskFile& file);
  absl::StatusOr<int64_t> Size(const DiskFile& file);
  // Fills `to`; DATA_LOSS where the file ends before.
  absl::Status Read(const DiskFile& file, int64_t offset, std::span<std::byte> to);

  absl::Status Rename(const std::string& from, const std::string& to);
  // No error where there is none.
  absl::Status Remove(const std::string& name);

 protected:
  // Asked before every system call, for tests: 0 lets it happen, an errno makes it fail. Reads and
  // writes may be cut short by lowering `bytes`.
  virtual int Interfere(absl::string_view call, size_t& bytes);

 private:
  // Makes a system call until it is not interrupted; -1 leaves errno.
  ssize_t Try(absl::string_view name, size_t bytes, absl::FunctionRef<ssize_t(size_t)> call);
  absl::StatusOr<DiskFile> Open(const std::string& name, int flags);

  const std::string root_;
};

}  // namespace certiq::server

#endif  // CERTIQ_STORE_DISK_H_
