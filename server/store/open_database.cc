#include "store/open_database.h"

#include <algorithm>
#include <cstdint>
#include <filesystem>
#include <optional>
#include <system_error>
#include <utility>

#include "absl/strings/str_cat.h"
#include "base/status_macros.h"
#include "store/rows.h"
#include "store/schema.h"
#include "store/upgrade.h"

namespace certiq::server {
namespace {

// Where SQLite, which follows no links, finds the file.
absl::StatusOr<std::string> DatabasePath(const Disk& disk) {
  std::error_code error;
  const std::filesystem::path root = std::filesystem::canonical(disk.Path(""), error);
  if (error) return DiskError("", "resolve links", error.value());
  return (root / kDatabaseName).string();
}

absl::StatusOr<DatabaseOwner> OwnerOf(SqlDatabase& database) {
  ASSIGN_OR_RETURN(const int64_t application, database.Number("PRAGMA application_id"));
  if (application == kApplicationId) return DatabaseOwner::kUs;
  if (application != 0) return DatabaseOwner::kOthers;
  ASSIGN_OR_RETURN(const int64_t version, database.Number("PRAGMA user_version"));
  ASSIGN_OR_RETURN(const int64_t tables, database.Number("SELECT count(*) FROM sqlite_schema"));
  if (version == 0) return tables == 0 ? DatabaseOwner::kNobody : DatabaseOwner::kOthers;
  // Earlier versions are known by their tables; one of the two may have been lost.
  ASSIGN_OR_RETURN(const int64_t columns, database.Number(R"sql(
SELECT max(columns) FROM (
  SELECT count(*) AS columns FROM pragma_table_info('jobs')
    WHERE name IN ('id', 'tenant', 'request_id', 'create_time', 'calibration_id', 'checksum')
  UNION ALL SELECT count(*) FROM pragma_table_info('calibrations')
    WHERE name IN ('id', 'tenant', 'request_id', 'create_time', 'checksum', 'version',
                   'held_out_block_rows'))
)sql"));
  return columns == 6 ? DatabaseOwner::kUs : DatabaseOwner::kOthers;
}

// The version of the tables, 0 where there are none. Writes nothing.
absl::StatusOr<int64_t> CheckVersion(SqlDatabase& database) {
  ASSIGN_OR_RETURN(const DatabaseOwner owner, OwnerOf(database));
  if (owner == DatabaseOwner::kOthers) {
    return absl::FailedPreconditionError(
        absl::StrCat(kDatabaseName, ": is the database of another program"));
  }
  ASSIGN_OR_RETURN(const int64_t version, database.Number("PRAGMA user_version"));
  if (version < 0 || version > kSchemaVersion) {
    return absl::FailedPreconditionError(
        absl::StrCat(kDatabaseName, ": was written by a newer version of this program (tables ",
                     version, ", expected at most ", kSchemaVersion, ")"));
  }
  return version;
}

absl::Status CreateTables(SqlDatabase& database, const std::string& lineage) {
  static_assert(kSchemaVersion == 2);
  RETURN_IF_ERROR(database.Run("BEGIN IMMEDIATE"));
  RETURN_IF_ERROR(database.Run(kCreateTables));
  RETURN_IF_ERROR(CreateCommits(database, lineage));
  return database.Run("PRAGMA user_version = 2; COMMIT");
}

absl::Status AddCommits(SqlDatabase& database, const std::string& lineage) {
  RETURN_IF_ERROR(database.Run("BEGIN IMMEDIATE"));
  RETURN_IF_ERROR(CreateCommits(database, lineage));
  return database.Run("COMMIT");
}

// Makes or changes tables until they are those of this version, with commits of this lineage where
// they have none yet.
absl::Status Complete(SqlDatabase& database, int64_t version, const std::string& lineage) {
  // In one piece, before there is a log: so the file itself says whose it is from then on.
  if (version == 0) RETURN_IF_ERROR(CreateTables(database, lineage));
  ASSIGN_OR_RETURN(const std::string mode, database.Text("PRAGMA journal_mode = WAL"));
  if (mode != "wal" && mode != "memory") {
    return database.Damaged(absl::StrCat("its journal mode stays ", mode));
  }
  if (version == 0) return absl::OkStatus();
  // Indexes too: a query believes them.
  ASSIGN_OR_RETURN(const std::string check, database.Text("PRAGMA integrity_check(1)"));
  if (check != "ok") return database.Damaged(check);
  if (version == 1) return UpgradeFromSchema1(database, lineage);
  ASSIGN_OR_RETURN(const std::optional<CommitsRow> row, ReadCommits(database));
  return row.has_value() ? absl::OkStatus() : AddCommits(database, lineage);
}

absl::Status SetUp(SqlDatabase& database) {
  return database.Run(
      "PRAGMA synchronous = FULL;"
      "PRAGMA foreign_keys = ON;"
      "PRAGMA cell_size_check = ON;"
      "PRAGMA trusted_schema = OFF;"
      "PRAGMA temp_store = MEMORY;");
}

absl::StatusOr<std::set<std::string>> NamedBlobs(SqlDatabase& database) {
  std::set<std::string> named;
  ASSIGN_OR_RETURN(const auto calibrations,
                   SelectRows<CalibrationRecord>(database, "", [](SqlStatement&) {}));
  for (const CalibrationRecord& record : calibrations) named.insert(record.sums().name());
  ASSIGN_OR_RETURN(const auto jobs, SelectRows<JobRecord>(database, "", [](SqlStatement&) {}));
  for (const JobRecord& record : jobs) {
    named.insert(record.weights().name());
    named.insert(record.result().blob().name());
  }
  return named;
}

// Begins another lineage with what is there. It ends with the file, so that until then the loss is
// found again.
absl::Status AcceptLoss(SqlDatabase& database, CommitsFile& commits,
                        absl::FunctionRef<SetAside> set_aside) {
  ASSIGN_OR_RETURN(const std::set<std::string> named, NamedBlobs(database));
  RETURN_IF_ERROR(set_aside(named));
  ASSIGN_OR_RETURN(const int64_t number, ReadCommitNumber(database));
  const Commits next = {.lineage = NewLineage(), .number = std::max(number, commits.number()) + 1};
  RETURN_IF_ERROR(database.Run("BEGIN IMMEDIATE"));
  RETURN_IF_ERROR(ResetCommits(database, next));
  RETURN_IF_ERROR(database.Run("COMMIT"));
  return commits.Create(next);
}

// The database as it is, to be looked at. Null where it is empty or not there, or where SQLite
// would first play a journal back: none of ours outlives the moment in which the tables are made.
absl::StatusOr<std::unique_ptr<SqlDatabase>> OpenToLook(Disk& disk, const char* vfs) {
  ASSIGN_OR_RETURN(const std::optional<DiskEntry> file, disk.Look(kDatabaseName));
  ASSIGN_OR_RETURN(const std::optional<DiskEntry> journal, disk.Look(kJournalName));
  if (!file.has_value() || file->bytes == 0 || journal.has_value()) return nullptr;
  ASSIGN_OR_RETURN(const std::optional<DiskEntry> log, disk.Look(kLogName));
  ASSIGN_OR_RETURN(const std::string path, DatabasePath(disk));
  return SqlDatabase::OpenToLook(path, kDatabaseName, vfs, log.has_value() && log->bytes > 0);
}

// The version of the tables, where nothing keeps this start from going on with them.
absl::StatusOr<int64_t> Examine(SqlDatabase& database,
                                const absl::StatusOr<std::optional<Commits>>& beside,
                                const std::string& accepted_loss, std::optional<Loss>& loss) {
  ASSIGN_OR_RETURN(const int64_t version, CheckVersion(database));
  ASSIGN_OR_RETURN(loss, FindLoss(database, beside));
  if (loss.has_value() && loss->code != accepted_loss) return LossError(*loss, accepted_loss);
  return version;
}

}  // namespace

absl::StatusOr<DatabaseOwner> LookAtDatabase(Disk& disk, const char* vfs) {
  ASSIGN_OR_RETURN(const std::optional<DiskEntry> file, disk.Look(kDatabaseName));
  if (!file.has_value() || file->bytes == 0) return DatabaseOwner::kNobody;
  ASSIGN_OR_RETURN(const std::unique_ptr<SqlDatabase> database, OpenToLook(disk, vfs));
  if (database == nullptr) return DatabaseOwner::kOthers;
  absl::StatusOr<DatabaseOwner> owner = OwnerOf(*database);
  // No database, or one of which nothing can be told.
  if (absl::IsDataLoss(owner.status())) return DatabaseOwner::kOthers;
  return owner;
}

absl::StatusOr<std::unique_ptr<SqlDatabase>> OpenDatabase(Disk& disk, const char* vfs,
                                                          CommitsFile& commits,
                                                          const std::string& accepted_loss,
                                                          absl::FunctionRef<SetAside> set_aside) {
  const absl::StatusOr<std::optional<Commits>> beside = commits.Read();
  if (!beside.ok() && !absl::IsDataLoss(beside.status())) return beside.status();
  const bool counted = !beside.ok() || beside->has_value();
  ASSIGN_OR_RETURN(const std::optional<DiskEntry> file, disk.Look(kDatabaseName));
  std::optional<Loss> loss;
  if (!file.has_value() || file->bytes == 0) {
    // Before SQLite removes the log of a database that is empty.
    loss = FindLossOfAll(beside);
    if (loss.has_value() && loss->code != accepted_loss) return LossError(*loss, accepted_loss);
  } else {
    // Opening it for good makes a log where there is none.
    ASSIGN_OR_RETURN(const std::unique_ptr<SqlDatabase> database, OpenToLook(disk, vfs));
    if (database != nullptr) {
      RETURN_IF_ERROR(Examine(*database, beside, accepted_loss, loss).status());
    }
  }
  const std::string lineage = beside.ok() && counted ? (*beside)->lineage : NewLineage();
  // Before the tables, so that a database that counts is never without it. One of an earlier
  // version did not count.
  if (!counted && !loss.has_value()) {
    RETURN_IF_ERROR(commits.Create({.lineage = lineage, .number = 0}));
  }
  // SQLite would let everyone read it, and its log after it.
  RETURN_IF_ERROR(disk.OpenOrCreate(kDatabaseName).status());
  ASSIGN_OR_RETURN(const std::string path, DatabasePath(disk));
  ASSIGN_OR_RETURN(std::unique_ptr<SqlDatabase> opened,
                   SqlDatabase::Open(path, kDatabaseName, vfs));
  SqlDatabase& database = *opened;
  // The log shows what was lost: it stays until the database is found whole.
  database.EmptyLogOnClose(false);
  // Exclusive, before anything is read: without others there is no need for shared memory in a
  // mapped file, which ends the process where the disk fails.
  RETURN_IF_ERROR(database.Run("PRAGMA locking_mode = EXCLUSIVE"));
  ASSIGN_OR_RETURN(const int64_t version, Examine(database, beside, accepted_loss, loss));
  RETURN_IF_ERROR(SetUp(database));
  RETURN_IF_ERROR(Complete(database, version, lineage));
  if (loss.has_value()) RETURN_IF_ERROR(AcceptLoss(database, commits, set_aside));
  database.EmptyLogOnClose(true);
  return opened;
}

absl::StatusOr<std::unique_ptr<SqlDatabase>> OpenMemoryDatabase() {
  ASSIGN_OR_RETURN(std::unique_ptr<SqlDatabase> database,
                   SqlDatabase::Open(":memory:", kDatabaseName, nullptr));
  RETURN_IF_ERROR(SetUp(*database));
  RETURN_IF_ERROR(Complete(*database, 0, NewLineage()));
  return database;
}

}  // namespace certiq::server
