// Opening state.db: whose it is, which version wrote it, and whether it is all there.

#ifndef CERTIQ_STORE_OPEN_DATABASE_H_
#define CERTIQ_STORE_OPEN_DATABASE_H_

#include <memory>
#include <set>
#include <string>

#include "absl/functional/function_ref.h"
#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "store/commits.h"
#include "store/disk.h"
#include "store/sqlite.h"

namespace certiq::server {

inline constexpr char kDatabaseName[] = "state.db";
inline constexpr char kLogName[] = "state.db-wal";
inline constexpr char kJournalName[] = "state.db-journal";

enum class DatabaseOwner {
  // There is nothing in it.
  kNobody,
  // This program, in whatever version.
  kUs,
  kOthers,
};

// Whose the file state.db is, which is there. Changes nothing.
absl::StatusOr<DatabaseOwner> LookAtDatabase(Disk& disk, const char* vfs);

// Keeps the blobs that no record names any more, and makes sure that no start removes them. The
// names are those that records name.
using SetAside = absl::Status(const std::set<std::string>& named);

// Opens the database, makes it where it is not there yet, and brings it up to date where an older
// version wrote it. `vfs` is SQLite's way to the file system, nullptr for the default.
// FAILED_PRECONDITION where a newer version or another program wrote it, DATA_LOSS where it has
// lost what `commits` says was acknowledged; both leave all files as they are. A loss whose code is
// `accepted_loss` is none, once `set_aside` has returned OK.
absl::StatusOr<std::unique_ptr<SqlDatabase>> OpenDatabase(Disk& disk, const char* vfs,
                                                          CommitsFile& commits,
                                                          const std::string& accepted_loss,
                                                          absl::FunctionRef<SetAside> set_aside);

absl::StatusOr<std::unique_ptr<SqlDatabase>> OpenMemoryDatabase();

}  // namespace certiq::server

#endif  // CERTIQ_STORE_OPEN_DATABASE_H_
