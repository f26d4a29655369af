#include "store/storage.h"

#include <utility>

#include "base/status_macros.h"
#include "store/file_blobs.h"
#include "store/memory_blobs.h"
#include "store/reserve.h"
#include "store/sqlite_catalog.h"

namespace certiq::server {
namespace {

constexpr char kLockName[] = "lock";

}  // namespace

absl::StatusOr<Storage> OpenStorage(const std::string& data_dir) {
  if (!data_dir.empty()) return OpenStorage(std::make_shared<Disk>(data_dir), nullptr);
  Storage storage;
  ASSIGN_OR_RETURN(storage.catalog, OpenMemoryCatalog());
  storage.blobs = MakeMemoryBlobs();
  return storage;
}

absl::StatusOr<Storage> OpenStorage(std::shared_ptr<Disk> disk, const char* vfs) {
  RETURN_IF_ERROR(disk->MakeDirectory(""));
  Storage storage;
  ASSIGN_OR_RETURN(DiskFile lock, disk->OpenOrCreate(kLockName));
  RETURN_IF_ERROR(disk->Lock(lock));
  storage.lock = std::make_shared<const DiskFile>(std::move(lock));
  for (const char* directory : {kBlobDirectory, kIncomingDirectory}) {
    RETURN_IF_ERROR(disk->MakeDirectory(directory));
  }
  // SQLite would let everyone read it, and its log after it.
  RETURN_IF_ERROR(disk->OpenOrCreate(kDatabaseName).status());
  const auto reserve = std::make_shared<DiskReserve>(disk);
  ASSIGN_OR_RETURN(storage.catalog, OpenSqliteCatalog(disk->Path(kDatabaseName), vfs, reserve));
  RETURN_IF_ERROR(reserve->Fill());
  RETURN_IF_ERROR(disk->SyncDirectory(""));
  storage.blobs = MakeFileBlobs(std::move(disk), reserve);
  return storage;
}

}  // namespace certiq::server
