// The storage of a server: its catalog and its blobs, opened together.

#ifndef CERTIQ_STORE_STORAGE_H_
#define CERTIQ_STORE_STORAGE_H_

#include <memory>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "store/blobs.h"
#include "store/catalog.h"
#include "store/disk.h"

namespace certiq::server {

struct Storage {
  // Holds the data directory's lock; given back last. Null in memory.
  std::shared_ptr<const DiskFile> lock;
  std::unique_ptr<Catalog> catalog;
  std::unique_ptr<Blobs> blobs;
  // What is odd about the data directory, for the log: a sentence each.
  std::vector<std::string> warnings;

  // Removes a blob that no record names any more, unless a crash could bring one back that does.
  void Forget(const BlobRef& blob) const {
    if (!blob.name().empty() && catalog->settled()) blobs->Remove(blob);
  }
};

// The storage in `data_dir`, which is made where it is not there; in memory where it is empty.
// FAILED_PRECONDITION where another process has the directory or it is not one of certiq's
// (data_dir.h), DATA_LOSS where it has lost what was acknowledged and `accepted_loss` is not the
// code of that loss (open_database.h): what is in it stays as it is then.
absl::StatusOr<Storage> OpenStorage(const std::string& data_dir,
                                    const std::string& accepted_loss = "");
// The same through a disk and a VFS of the caller's.
absl::StatusOr<Storage> OpenStorage(std::shared_ptr<Disk> disk, const char* vfs,
                                    const std::string& accepted_loss = "");

}  // namespace certiq::server

#endif  // CERTIQ_STORE_STORAGE_H_
