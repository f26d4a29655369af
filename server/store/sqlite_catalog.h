// The embedded catalog: SQLite, in a file or in memory.

#ifndef CERTIQ_STORE_SQLITE_CATALOG_H_
#define CERTIQ_STORE_SQLITE_CATALOG_H_

#include <memory>
#include <string>

#include "absl/functional/function_ref.h"
#include "absl/status/statusor.h"
#include "store/catalog.h"
#include "store/disk.h"
#include "store/open_database.h"
#include "store/reserve.h"

namespace certiq::server {

// The catalog in a data directory, as OpenDatabase opens it. The reserve is given up where what
// makes room finds the disk full.
absl::StatusOr<std::unique_ptr<Catalog>> OpenSqliteCatalog(const std::shared_ptr<Disk>& disk,
                                                           const char* vfs,
                                                           std::shared_ptr<DiskReserve> reserve,
                                                           const std::string& accepted_loss,
                                                           absl::FunctionRef<SetAside> set_aside);

// The catalog of a server without a data directory.
absl::StatusOr<std::unique_ptr<Catalog>> OpenMemoryCatalog();

}  // namespace certiq::server

#endif  // CERTIQ_STORE_SQLITE_CATALOG_H_
