// The embedded catalog: SQLite, in a file or in memory.

#ifndef CERTIQ_STORE_SQLITE_CATALOG_H_
#define CERTIQ_STORE_SQLITE_CATALOG_H_

#include <memory>
#include <string>

#include "absl/status/statusor.h"
#include "store/catalog.h"
#include "store/reserve.h"

namespace certiq::server {

inline constexpr char kDatabaseName[] = "state.db";

// The catalog in the file `path`, brought up to date where an older version wrote it. `vfs` is
// SQLite's way to the file system, nullptr for the default; the reserve is given up where a removal
// finds the disk full. FAILED_PRECONDITION where a newer version or another program wrote it.
absl::StatusOr<std::unique_ptr<Catalog>> OpenSqliteCatalog(const std::string& path, const char* vfs,
                                                           std::shared_ptr<DiskReserve> reserve);

// The catalog of a server without a data directory.
absl::StatusOr<std::unique_ptr<Catalog>> OpenMemoryCatalog();

}  // namespace certiq::server

#endif  // CERTIQ_STORE_SQLITE_CATALOG_H_
