// The store in a data directory: records in a SQLite database, blobs in files beside it.

#ifndef CERTIQ_STORE_SQLITE_STORE_H_
#define CERTIQ_STORE_SQLITE_STORE_H_

#include <memory>
#include <string>

#include "absl/status/statusor.h"
#include "store/disk.h"
#include "store/store.h"

namespace certiq::server {

// Makes the directory (not its parents) if it is missing, and holds it for this process alone.
// Errors beside Store's: FAILED_PRECONDITION where another process holds it, or where a newer
// version or another program wrote what is there.
absl::StatusOr<std::unique_ptr<Store>> OpenSqliteStore(const std::string& data_dir);

// The same where tests make disks fail. `vfs` is the name of SQLite's way to files, nullptr for
// its default.
absl::StatusOr<std::unique_ptr<Store>> OpenSqliteStore(std::shared_ptr<Disk> disk, const char* vfs);

}  // namespace certiq::server

#endif  // CERTIQ_STORE_SQLITE_STORE_H_
