#include "store/storage.h"

#include <set>
#include <utility>

#include "base/status_macros.h"
#include "store/data_dir.h"
#include "store/file_blobs.h"
#include "store/memory_blobs.h"
#include "store/reserve.h"
#include "store/sqlite_catalog.h"

namespace certiq::server {
namespace {

absl::Status MakeBlobDirectories(Disk& disk) {
  RETURN_IF_ERROR(disk.MakeDirectory(kBlobDirectory));
  return disk.MakeDirectory(kIncomingDirectory);
}

}  // namespace

absl::StatusOr<Storage> OpenStorage(const std::string& data_dir, const std::string& accepted_loss) {
  if (!data_dir.empty()) {
    return OpenStorage(std::make_shared<Disk>(data_dir), nullptr, accepted_loss);
  }
  Storage storage;
  ASSIGN_OR_RETURN(storage.catalog, OpenMemoryCatalog());
  storage.blobs = MakeMemoryBlobs();
  return storage;
}

absl::StatusOr<Storage> OpenStorage(std::shared_ptr<Disk> disk, const char* vfs,
                                    const std::string& accepted_loss) {
  Storage storage;
  ASSIGN_OR_RETURN(storage.lock, TakeDataDir(*disk, vfs));
  const auto reserve = std::make_shared<DiskReserve>(disk);
  // The database is the first to be there, as it says whose directory this is.
  ASSIGN_OR_RETURN(storage.catalog,
                   OpenSqliteCatalog(disk, vfs, reserve, accepted_loss,
                                     [&](const std::set<std::string>& named) -> absl::Status {
                                       RETURN_IF_ERROR(MakeBlobDirectories(*disk));
                                       return SetAsideAllBut(*disk, named);
                                     }));
  RETURN_IF_ERROR(MakeBlobDirectories(*disk));
  RETURN_IF_ERROR(reserve->Fill());
  RETURN_IF_ERROR(disk->SyncDirectory(""));
  ASSIGN_OR_RETURN(storage.warnings, WarningsAbout(*disk));
  storage.blobs = MakeFileBlobs(std::move(disk), reserve);
  return storage;
}

}  // namespace certiq::server
