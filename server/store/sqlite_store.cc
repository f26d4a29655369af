#include "store/sqlite_store.h"

#include <mutex>
#include <unordered_set>
#include <utility>

#include "absl/functional/function_ref.h"
#include "absl/strings/str_cat.h"
#include "store/blob_file.h"
#include "store/records.h"
#include "store/schema.h"
#include "store/sqlite.h"

namespace certiq::server {
namespace {

constexpr char kLockName[] = "lock";
constexpr char kDatabaseName[] = "state.db";
// Deleting a record writes some pages before anything is freed. Where the disk has no room for
// them, this file gives its own up.
constexpr char kReserveName[] = "reserve";
constexpr int64_t kReserveBytes = int64_t{1} << 20;

absl::Status FillReserve(Disk& disk) {
  const absl::StatusOr<DiskFile> file = disk.OpenOrCreate(kReserveName);
  absl::Status status = file.ok() ? disk.Allocate(*file, kReserveBytes) : file.status();
  // What a full disk had left is not kept from others.
  if (absl::IsResourceExhausted(status)) disk.Remove(kReserveName).IgnoreError();
  return status;
}

// The version of the tables, 0 where there are none. Writes nothing.
absl::StatusOr<int64_t> CheckVersion(SqlDatabase& database) {
  absl::StatusOr<int64_t> version = database.Number("PRAGMA user_version");
  if (!version.ok()) return version;
  if (*version < 0 || *version > kSchemaVersion) {
    return absl::FailedPreconditionError(
        absl::StrCat(kDatabaseName, ": was written by a newer version of this program (tables ",
                     *version, ", expected at most ", kSchemaVersion, ")"));
  }
  const absl::StatusOr<int64_t> tables = database.Number("SELECT count(*) FROM sqlite_schema");
  if (!tables.ok()) return tables.status();
  if (*version == 0 && *tables != 0) {
    return absl::FailedPreconditionError(
        absl::StrCat(kDatabaseName, ": is the database of another program"));
  }
  return version;
}

absl::Status CreateTables(SqlDatabase& database) {
  static_assert(kSchemaVersion == 1);
  absl::Status status = database.Run("BEGIN IMMEDIATE");
  if (status.ok()) status = database.Run(kCreateTables);
  if (status.ok()) status = database.Run("PRAGMA user_version = 1");
  if (status.ok()) status = database.Run("COMMIT");
  return status;
}

absl::StatusOr<std::unique_ptr<SqlDatabase>> OpenDatabase(const std::string& path,
                                                          const char* vfs) {
  absl::StatusOr<std::unique_ptr<SqlDatabase>> opened = SqlDatabase::Open(path, kDatabaseName, vfs);
  if (!opened.ok()) return opened;
  SqlDatabase& database = **opened;
  // Exclusive, before anything is read: without others there is no need for shared memory in a
  // mapped file, which ends the process where the disk fails.
  absl::Status status = database.Run("PRAGMA locking_mode = EXCLUSIVE");
  if (!status.ok()) return status;
  const absl::StatusOr<int64_t> version = CheckVersion(database);
  if (!version.ok()) return version.status();
  const absl::StatusOr<std::string> mode = database.Text("PRAGMA journal_mode = WAL");
  if (!mode.ok()) return mode.status();
  if (*mode != "wal") return database.Damaged(absl::StrCat("its journal mode stays ", *mode));
  status = database.Run(
      "PRAGMA synchronous = FULL;"
      "PRAGMA foreign_keys = ON;"
      "PRAGMA cell_size_check = ON;"
      "PRAGMA trusted_schema = OFF;"
      "PRAGMA temp_store = MEMORY;");
  if (status.ok() && *version == 0) status = CreateTables(database);
  if (!status.ok()) return status;
  return opened;
}

class SqliteStore final : public Store {
 public:
  SqliteStore(std::shared_ptr<Disk> disk, DiskFile lock, std::unique_ptr<SqlDatabase> database,
              bool reserved)
      : lock_(std::move(lock)),
        disk_(std::move(disk)),
        database_(std::move(database)),
        reserve_spent_(!reserved) {}

  bool durable() const override { return true; }
  absl::StatusOr<StoredState> Load() override;
  absl::StatusOr<std::unique_ptr<BlobWriter>> CreateBlob() override {
    return CreateBlobFile(disk_);
  }
  absl::StatusOr<std::unique_ptr<BlobReader>> OpenBlob(const BlobRef& blob) override {
    return OpenBlobFile(disk_, blob);
  }
  void DeleteBlob(const BlobRef& blob) override;
  absl::Status PutCalibration(const CalibrationRecord& record) override;
  absl::Status PutJob(const JobRecord& record) override;
  absl::Status DeleteCalibration(const std::string& id) override {
    return DeleteRecord(kDeleteCalibration, id);
  }
  absl::Status DeleteJob(const std::string& id) override { return DeleteRecord(kDeleteJob, id); }

 private:
  // Runs `body` as one transaction.
  absl::Status Transact(absl::FunctionRef<absl::Status()> body);
  void UndoCommit();
  // For `sql` with the id as its parameter. REQUIRES: in a transaction.
  absl::Status Delete(const char* sql, const std::string& id);
  // In a transaction of its own, with the reserve where the disk is full.
  absl::Status DeleteRecord(const char* sql, const std::string& id);
  absl::Status RemoveUnnamed(const StoredState& state);

  // Given back last.
  const DiskFile lock_;
  const std::shared_ptr<Disk> disk_;
  std::mutex mu_;
  const std::unique_ptr<SqlDatabase> database_;  // guarded by mu_
  // A commit failed, but a crash now could still bring it back. Guarded by mu_.
  bool undead_ = false;
  // The reserve is not there, and to be made once there is room. Guarded by mu_.
  bool reserve_spent_;
};

absl::Status SqliteStore::Transact(absl::FunctionRef<absl::Status()> body) {
  const std::lock_guard lock(mu_);
  absl::Status status = database_->Run("BEGIN IMMEDIATE");
  if (status.ok()) status = body();
  const bool committing = status.ok();
  if (committing) status = database_->Run("COMMIT");
  if (status.ok()) {
    // What it wrote lies over what failed before.
    undead_ = false;
    return status;
  }
  if (database_->in_transaction()) database_->Run("ROLLBACK").IgnoreError();
  if (committing) UndoCommit();
  return status;
}

// A commit whose sync failed may lie whole in the log, where a restart after a crash would find
// it. Emptying the log removes it.
void SqliteStore::UndoCommit() {
  const absl::StatusOr<int64_t> busy = database_->Number("PRAGMA wal_checkpoint(TRUNCATE)");
  undead_ = !busy.ok() || *busy != 0;
}

absl::Status SqliteStore::Delete(const char* sql, const std::string& id) {
  absl::StatusOr<SqlStatement> statement = database_->Prepare(sql);
  if (!statement.ok()) return statement.status();
  statement->BindText(id);
  return statement->Run();
}

absl::StatusOr<StoredState> SqliteStore::Load() {
  const std::lock_guard lock(mu_);
  const absl::StatusOr<std::string> check = database_->Text("PRAGMA quick_check(1)");
  if (!check.ok()) return check.status();
  if (*check != "ok") return database_->Damaged(*check);
  absl::StatusOr<StoredState> state = SelectAll(*database_);
  if (!state.ok()) return state;
  if (absl::Status status = RemoveUnnamed(*state); !status.ok()) return status;
  return state;
}

absl::Status SqliteStore::RemoveUnnamed(const StoredState& state) {
  std::unordered_set<std::string> named;
  for (const CalibrationRecord& record : state.calibrations) named.insert(record.sums.name);
  for (const JobRecord& record : state.jobs) {
    named.insert(record.weights.name);
    named.insert(record.result.name);
  }
  const absl::StatusOr<std::vector<std::string>> blobs = disk_->List(kBlobDirectory);
  if (!blobs.ok()) return blobs.status();
  for (const std::string& name : *blobs) {
    if (named.contains(name)) continue;
    if (absl::Status status = RemoveBlobFile(*disk_, name); !status.ok()) return status;
  }
  const absl::StatusOr<std::vector<std::string>> incoming = disk_->List(kIncomingDirectory);
  if (!incoming.ok()) return incoming.status();
  for (const std::string& name : *incoming) {
    absl::Status status = disk_->Remove(absl::StrCat(kIncomingDirectory, "/", name));
    if (!status.ok()) return status;
  }
  return absl::OkStatus();
}

void SqliteStore::DeleteBlob(const BlobRef& blob) {
  {
    const std::lock_guard lock(mu_);
    // The record that a crash could bring back may name it; the next start knows.
    if (undead_) return;
  }
  RemoveBlobFile(*disk_, blob.name).IgnoreError();
  const std::lock_guard lock(mu_);
  if (reserve_spent_) reserve_spent_ = !FillReserve(*disk_).ok();
}

absl::Status SqliteStore::PutCalibration(const CalibrationRecord& record) {
  return Transact([&] {
    absl::Status status = Delete(kDeleteCalibration, record.id);
    return status.ok() ? InsertCalibration(*database_, record) : status;
  });
}

absl::Status SqliteStore::PutJob(const JobRecord& record) {
  return Transact([&] {
    absl::Status status = Delete(kDeleteJob, record.id);
    return status.ok() ? InsertJob(*database_, record) : status;
  });
}

absl::Status SqliteStore::DeleteRecord(const char* sql, const std::string& id) {
  const auto body = [&] { return Delete(sql, id); };
  absl::Status status = Transact(body);
  if (!absl::IsResourceExhausted(status)) return status;
  {
    const std::lock_guard lock(mu_);
    if (!disk_->Remove(kReserveName).ok()) return status;
    reserve_spent_ = true;
  }
  return Transact(body);
}

}  // namespace

absl::StatusOr<std::unique_ptr<Store>> OpenSqliteStore(const std::string& data_dir) {
  return OpenSqliteStore(std::make_shared<Disk>(data_dir), nullptr);
}

absl::StatusOr<std::unique_ptr<Store>> OpenSqliteStore(std::shared_ptr<Disk> disk,
                                                       const char* vfs) {
  if (absl::Status status = disk->MakeDirectory(""); !status.ok()) return status;
  absl::StatusOr<DiskFile> lock = disk->OpenOrCreate(kLockName);
  if (!lock.ok()) return lock.status();
  if (absl::Status status = disk->Lock(*lock); !status.ok()) return status;
  for (const char* directory : {kBlobDirectory, kIncomingDirectory}) {
    if (absl::Status status = disk->MakeDirectory(directory); !status.ok()) return status;
  }
  // SQLite would let everyone read it, and its log after it.
  if (absl::Status status = disk->OpenOrCreate(kDatabaseName).status(); !status.ok()) return status;
  absl::StatusOr<std::unique_ptr<SqlDatabase>> database =
      OpenDatabase(disk->Path(kDatabaseName), vfs);
  if (!database.ok()) return database.status();
  // A disk that is full already is no reason not to start: what is there can be read.
  absl::Status reserved = FillReserve(*disk);
  if (!reserved.ok() && !absl::IsResourceExhausted(reserved)) return reserved;
  if (absl::Status status = disk->SyncDirectory(""); !status.ok()) return status;
  return std::make_unique<SqliteStore>(std::move(disk), *std::move(lock), *std::move(database),
                                       reserved.ok());
}

}  // namespace certiq::server
