#include "store/sqlite_catalog.h"

#include <utility>

#include "absl/base/thread_annotations.h"
#include "absl/strings/str_cat.h"
#include "base/mutex.h"
#include "base/status_macros.h"
#include "contract/paging.h"
#include "store/commits.h"
#include "store/open_database.h"
#include "store/rows.h"
#include "store/sqlite.h"

namespace certiq::server {
namespace {

absl::Status NoCalibration(const std::string& id) {
  return absl::NotFoundError(absl::StrCat("there is no calibration ", id));
}
absl::Status NoJob(const std::string& id) {
  return absl::NotFoundError(absl::StrCat("there is no job ", id));
}

// Reads one record; NOT_FOUND where there is none. A null tenant stands for any.
absl::StatusOr<CalibrationRecord> ReadCalibration(SqlDatabase& database, const std::string* tenant,
                                                  const std::string& id) {
  ASSIGN_OR_RETURN(
      std::optional<CalibrationRecord> found,
      SelectRow<CalibrationRecord>(database, "WHERE id = ?",
                                   [&](SqlStatement& select) { select.BindText(id); }));
  if (!found.has_value() || (tenant != nullptr && found->tenant() != *tenant)) {
    return NoCalibration(id);
  }
  return *std::move(found);
}

absl::StatusOr<JobRecord> ReadJob(SqlDatabase& database, const std::string* tenant,
                                  const std::string& id) {
  ASSIGN_OR_RETURN(std::optional<JobRecord> found,
                   SelectRow<JobRecord>(database, "WHERE id = ?",
                                        [&](SqlStatement& select) { select.BindText(id); }));
  if (!found.has_value() || (tenant != nullptr && found->tenant() != *tenant)) return NoJob(id);
  return *std::move(found);
}

absl::StatusOr<int64_t> CountUnfinished(SqlDatabase& database, const std::string& calibration_id) {
  ASSIGN_OR_RETURN(
      SqlStatement select,
      database.Prepare("SELECT count(*) FROM jobs WHERE calibration_id = ? AND state < 3"));
  select.BindText(calibration_id);
  RETURN_IF_ERROR(select.Step().status());
  return select.NextInteger();
}

absl::StatusOr<std::optional<JobRecord>> ReadJobOfRequest(SqlDatabase& database,
                                                          const std::string& tenant,
                                                          const std::string& request_id) {
  return SelectRow<JobRecord>(database, "WHERE request_id <> '' AND tenant = ? AND request_id = ?",
                              [&](SqlStatement& select) {
                                select.BindText(tenant);
                                select.BindText(request_id);
                              });
}

class SqliteCatalog final : public Catalog {
 public:
  // In memory there are neither a reserve nor a file of commits.
  SqliteCatalog(std::unique_ptr<SqlDatabase> database, std::shared_ptr<DiskReserve> reserve,
                std::unique_ptr<CommitsFile> commits)
      : reserve_(std::move(reserve)),
        database_(std::move(database)),
        commits_(std::move(commits)) {}

  bool durable() const override { return reserve_ != nullptr; }
  bool settled() const override {
    const base::MutexLock lock(mu_);
    return settled_;
  }

  absl::Status Register(const std::string& replica, base::UnixMicros now,
                        absl::FunctionRef<void(const CalibrationRecord&)> calibration,
                        absl::FunctionRef<void(const JobRecord&)> job) override;

  absl::StatusOr<CalibrationRecord> AddCalibration(const CalibrationRecord& record) override;
  absl::StatusOr<CalibrationRecord> FindCalibration(const std::string& tenant,
                                                    const std::string& id) override;
  absl::StatusOr<std::optional<CalibrationRecord>> FindCalibrationOfRequest(
      const std::string& tenant, const std::string& request_id) override;
  absl::StatusOr<std::vector<CalibrationRecord>> Calibrations(const CalibrationFilter& filter,
                                                              const std::optional<PageKey>& after,
                                                              int64_t count) override;
  absl::StatusOr<std::vector<CalibrationRecord>> ExpiredCalibrations(base::UnixMicros now) override;
  absl::StatusOr<CalibrationRecord> CommitSums(const std::string& id,
                                               const SumsCommit& commit) override;
  absl::StatusOr<CalibrationRecord> RemoveCalibration(const std::string& tenant,
                                                      const std::string& id) override;
  absl::StatusOr<int64_t> UnfinishedJobs(const std::string& calibration_id) override;

  absl::StatusOr<JobChange> AddJob(const JobRecord& record) override;
  absl::StatusOr<JobRecord> FindJob(const std::string& tenant, const std::string& id) override;
  absl::StatusOr<std::optional<JobRecord>> FindJobOfRequest(const std::string& tenant,
                                                            const std::string& request_id) override;
  absl::StatusOr<std::vector<JobRecord>> Jobs(const JobFilter& filter,
                                              const std::optional<PageKey>& after,
                                              int64_t count) override;
  absl::StatusOr<int64_t> Ahead(const JobRecord& job) override;
  absl::StatusOr<std::vector<JobRecord>> OverdueJobs(base::UnixMicros now) override;
  absl::StatusOr<std::vector<JobRecord>> ExpiredJobs(base::UnixMicros now) override;
  absl::StatusOr<std::optional<JobRecord>> ClaimJob(const std::string& replica,
                                                    const std::string& claim,
                                                    const std::set<std::string>& without) override;
  absl::StatusOr<JobChange> StartJob(const std::string& id, const std::string& claim,
                                     base::UnixMicros now) override;
  absl::StatusOr<JobChange> ReleaseJob(const std::string& id, const std::string& claim) override;
  absl::StatusOr<JobChange> FinishJob(const std::string& id, const std::string& claim,
                                      const JobOutcome& outcome) override;
  absl::StatusOr<JobChange> CancelJob(const std::string& tenant, const std::string& id,
                                      const absl::Status& reason, base::UnixMicros now) override;
  absl::StatusOr<JobRecord> RemoveJob(const std::string& tenant, const std::string& id) override;

 private:
  using Body = absl::FunctionRef<absl::Status(SqlDatabase&)>;

  // Runs `body` as one transaction.
  absl::Status Transact(Body body) ABSL_LOCKS_EXCLUDED(mu_);
  // The same for what makes room, or lets work end that does: it may spend the reserve.
  absl::Status TransactFreeing(Body body) ABSL_LOCKS_EXCLUDED(mu_);
  // Writes the log into the database, so that the next commit is written over it and takes no room.
  void RewindLog() ABSL_LOCKS_EXCLUDED(mu_);
  void UndoCommit() ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  // What is said beside the database about a transaction that changed something: before and after
  // it is committed.
  absl::StatusOr<int64_t> NumberOfCommit() ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  void NoteCommit(int64_t number) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  // Those that a crash kept from being told.
  absl::Status NoteCommits() ABSL_LOCKS_EXCLUDED(mu_);

  // Applies an event to a job, and writes the job where the event changed it.
  using Transaction = absl::Status (SqliteCatalog::*)(Body);
  absl::StatusOr<JobChange> Apply(
      Transaction transact, const std::string* tenant, const std::string& id,
      absl::FunctionRef<absl::StatusOr<JobRecord>(const JobRecord&)> event);

  const std::shared_ptr<DiskReserve> reserve_;
  mutable base::Mutex mu_;
  const std::unique_ptr<SqlDatabase> database_ ABSL_PT_GUARDED_BY(mu_);
  const std::unique_ptr<CommitsFile> commits_ ABSL_PT_GUARDED_BY(mu_);
  bool settled_ ABSL_GUARDED_BY(mu_) = true;
};

absl::Status SqliteCatalog::Transact(Body body) {
  const base::MutexLock lock(mu_);
  const int64_t changes = database_->changes();
  absl::Status status = database_->Run("BEGIN IMMEDIATE");
  if (status.ok()) status = body(*database_);
  const bool changed = database_->changes() != changes;
  absl::StatusOr<int64_t> number = 0;
  if (status.ok() && changed) {
    number = NumberOfCommit();
    status = number.status();
  }
  const bool committing = status.ok();
  if (committing) status = database_->Run("COMMIT");
  if (status.ok()) {
    if (!changed) return status;
    // What it wrote lies over what failed before.
    settled_ = true;
    NoteCommit(*number);
    return status;
  }
  if (database_->in_transaction()) database_->Run("ROLLBACK").IgnoreError();
  if (committing) UndoCommit();
  return status;
}

absl::StatusOr<int64_t> SqliteCatalog::NumberOfCommit() {
  if (commits_ == nullptr) return 0;
  // At most one commit at a time is not told beside the database.
  RETURN_IF_ERROR(commits_->CatchUp());
  return ReadCommitNumber(*database_);
}

void SqliteCatalog::NoteCommit(int64_t number) {
  if (commits_ == nullptr || commits_->Advance(number).ok()) return;
  // It is durable, and cannot be taken back: who is told that it failed would undo what belongs to
  // it. Outside the log nothing can drop it either; the next commit begins with its number.
  database_->Number("PRAGMA wal_checkpoint(TRUNCATE)").status().IgnoreError();
}

// A commit whose sync failed may lie whole in the log, where a restart after a crash would find
// it. Emptying the log removes it.
void SqliteCatalog::UndoCommit() {
  const absl::StatusOr<int64_t> busy = database_->Number("PRAGMA wal_checkpoint(TRUNCATE)");
  settled_ = busy.ok() && *busy == 0;
}

absl::Status SqliteCatalog::TransactFreeing(Body body) {
  absl::Status status = Transact(body);
  if (reserve_ == nullptr) return status;
  if (absl::IsResourceExhausted(status)) {
    if (!reserve_->Spend().ok()) return status;
    status = Transact(body);
  }
  // Others may have taken what the reserve gave up. What the log holds they cannot take.
  if (!reserve_->held()) RewindLog();
  return absl::IsResourceExhausted(status) ? Transact(body) : status;
}

void SqliteCatalog::RewindLog() {
  const base::MutexLock lock(mu_);
  database_->Number("PRAGMA wal_checkpoint(RESTART)").status().IgnoreError();
}

absl::Status SqliteCatalog::Register(const std::string& /*replica*/, base::UnixMicros now,
                                     absl::FunctionRef<void(const CalibrationRecord&)> calibration,
                                     absl::FunctionRef<void(const JobRecord&)> job) {
  // There is one replica, and it is the only one that can have the file open: whoever claimed
  // before is dead.
  std::vector<CalibrationRecord> calibrations;
  std::vector<JobRecord> jobs;
  RETURN_IF_ERROR(TransactFreeing([&](SqlDatabase& database) -> absl::Status {
    ASSIGN_OR_RETURN(calibrations,
                     SelectRows<CalibrationRecord>(database, "ORDER BY id", [](SqlStatement&) {}));
    RETURN_IF_ERROR(CheckLabels(database, calibrations));
    ASSIGN_OR_RETURN(jobs,
                     SelectRows<JobRecord>(database, "ORDER BY number", [](SqlStatement&) {}));
    for (JobRecord& record : jobs) {
      // Schema 1 had no claims: what ran has no owner either.
      if (record.owner().empty() && record.state() != v1::JOB_STATE_RUNNING) continue;
      record = Fence(std::move(record), now);
      RETURN_IF_ERROR(PutRow(database, record));
    }
    return absl::OkStatus();
  }));
  RETURN_IF_ERROR(NoteCommits());
  for (const CalibrationRecord& record : calibrations) calibration(record);
  for (const JobRecord& record : jobs) job(record);
  return absl::OkStatus();
}

absl::Status SqliteCatalog::NoteCommits() {
  const base::MutexLock lock(mu_);
  if (commits_ == nullptr) return absl::OkStatus();
  ASSIGN_OR_RETURN(const int64_t number, ReadCommitNumber(*database_));
  return number > commits_->number() ? commits_->Advance(number) : commits_->CatchUp();
}

absl::StatusOr<CalibrationRecord> SqliteCatalog::AddCalibration(const CalibrationRecord& record) {
  CalibrationRecord added = record;
  RETURN_IF_ERROR(Transact([&](SqlDatabase& database) -> absl::Status {
    ASSIGN_OR_RETURN(
        std::optional<CalibrationRecord> known,
        SelectRow<CalibrationRecord>(
            database, "WHERE id = ?1 OR (request_id <> '' AND tenant = ?2 AND request_id = ?3)",
            [&](SqlStatement& select) {
              select.BindText(record.id());
              select.BindText(record.tenant());
              select.BindText(record.request_id());
            }));
    if (known.has_value()) {
      added = *std::move(known);
      return absl::OkStatus();
    }
    return PutRow(database, record);
  }));
  return added;
}

absl::StatusOr<CalibrationRecord> SqliteCatalog::FindCalibration(const std::string& tenant,
                                                                 const std::string& id) {
  const base::MutexLock lock(mu_);
  return ReadCalibration(*database_, &tenant, id);
}

absl::StatusOr<std::optional<CalibrationRecord>> SqliteCatalog::FindCalibrationOfRequest(
    const std::string& tenant, const std::string& request_id) {
  const base::MutexLock lock(mu_);
  return SelectRow<CalibrationRecord>(*database_,
                                      "WHERE request_id <> '' AND tenant = ? AND request_id = ?",
                                      [&](SqlStatement& select) {
                                        select.BindText(tenant);
                                        select.BindText(request_id);
                                      });
}

absl::StatusOr<std::vector<CalibrationRecord>> SqliteCatalog::Calibrations(
    const CalibrationFilter& filter, const std::optional<PageKey>& after, int64_t count) {
  const PageKey key = after.value_or(PageKey());
  const base::MutexLock lock(mu_);
  return SelectRows<CalibrationRecord>(
      *database_, R"sql(
WHERE tenant = ?1
  AND (?2 OR (create_time, id) < (?3, ?4))
  AND (?5 = '' OR EXISTS (SELECT 1 FROM calibration_labels
                          WHERE calibration_id = calibrations.id AND label = ?5))
ORDER BY create_time DESC, id DESC LIMIT ?6
)sql",
      [&](SqlStatement& select) {
        select.BindText(filter.tenant);
        select.BindInteger(after.has_value() ? 0 : 1);
        select.BindInteger(key.first);
        select.BindText(key.second);
        select.BindText(filter.label);
        select.BindInteger(count);
      },
      kMaxPageBytes);
}

absl::StatusOr<std::vector<CalibrationRecord>> SqliteCatalog::ExpiredCalibrations(
    base::UnixMicros now) {
  const base::MutexLock lock(mu_);
  return SelectRows<CalibrationRecord>(*database_, "WHERE expire_time <= ? ORDER BY expire_time",
                                       [&](SqlStatement& select) { select.BindInteger(now); });
}

absl::StatusOr<CalibrationRecord> SqliteCatalog::CommitSums(const std::string& id,
                                                            const SumsCommit& commit) {
  CalibrationRecord written;
  RETURN_IF_ERROR(Transact([&](SqlDatabase& database) -> absl::Status {
    ASSIGN_OR_RETURN(CalibrationRecord before, ReadCalibration(database, nullptr, id));
    ASSIGN_OR_RETURN(written, Commit(std::move(before), commit));
    return PutRow(database, written);
  }));
  return written;
}

absl::StatusOr<int64_t> SqliteCatalog::UnfinishedJobs(const std::string& calibration_id) {
  const base::MutexLock lock(mu_);
  return CountUnfinished(*database_, calibration_id);
}

absl::StatusOr<CalibrationRecord> SqliteCatalog::RemoveCalibration(const std::string& tenant,
                                                                   const std::string& id) {
  CalibrationRecord removed;
  RETURN_IF_ERROR(TransactFreeing([&](SqlDatabase& database) -> absl::Status {
    ASSIGN_OR_RETURN(removed, ReadCalibration(database, &tenant, id));
    ASSIGN_OR_RETURN(const int64_t jobs, CountUnfinished(database, id));
    RETURN_IF_ERROR(CheckRemovable(removed, jobs));
    return DeleteRow<CalibrationRecord>(database, id);
  }));
  return removed;
}

absl::StatusOr<std::optional<JobRecord>> SqliteCatalog::FindJobOfRequest(
    const std::string& tenant, const std::string& request_id) {
  const base::MutexLock lock(mu_);
  return ReadJobOfRequest(*database_, tenant, request_id);
}

absl::StatusOr<JobChange> SqliteCatalog::AddJob(const JobRecord& record) {
  JobChange change;
  change.job = record;
  RETURN_IF_ERROR(Transact([&](SqlDatabase& database) -> absl::Status {
    ASSIGN_OR_RETURN(std::optional<JobRecord> known,
                     SelectRow<JobRecord>(database, "WHERE id = ?", [&](SqlStatement& select) {
                       select.BindText(record.id());
                     }));
    if (!known.has_value() && !record.request_id().empty()) {
      ASSIGN_OR_RETURN(known, ReadJobOfRequest(database, record.tenant(), record.request_id()));
    }
    if (known.has_value()) {
      change = {.before = known->state(), .job = *known, .changed = false};
      return absl::OkStatus();
    }
    ASSIGN_OR_RETURN(const CalibrationRecord calibration,
                     ReadCalibration(database, &record.tenant(), record.calibration_id()));
    RETURN_IF_ERROR(CheckFinalized(calibration));
    ASSIGN_OR_RETURN(const int64_t last,
                     database.Number("SELECT coalesce(max(number), 0) FROM jobs"));
    change.job.set_number(last + 1);
    return PutRow(database, change.job);
  }));
  return change;
}

absl::StatusOr<JobRecord> SqliteCatalog::FindJob(const std::string& tenant, const std::string& id) {
  const base::MutexLock lock(mu_);
  return ReadJob(*database_, &tenant, id);
}

absl::StatusOr<std::vector<JobRecord>> SqliteCatalog::Jobs(const JobFilter& filter,
                                                           const std::optional<PageKey>& after,
                                                           int64_t count) {
  const PageKey key = after.value_or(PageKey());
  int64_t states = filter.states.empty() ? ~int64_t{0} : 0;
  for (const JobState state : filter.states) states |= int64_t{1} << state;
  const base::MutexLock lock(mu_);
  return SelectRows<JobRecord>(
      *database_, R"sql(
WHERE tenant = ?1
  AND (?2 OR (create_time, id) < (?3, ?4))
  AND ((?5 >> state) & 1)
  AND (?6 = '' OR calibration_id = ?6)
ORDER BY create_time DESC, id DESC LIMIT ?7
)sql",
      [&](SqlStatement& select) {
        select.BindText(filter.tenant);
        select.BindInteger(after.has_value() ? 0 : 1);
        select.BindInteger(key.first);
        select.BindText(key.second);
        select.BindInteger(states);
        select.BindText(filter.calibration_id);
        select.BindInteger(count);
      },
      kMaxPageBytes);
}

absl::StatusOr<int64_t> SqliteCatalog::Ahead(const JobRecord& job) {
  if (job.state() != v1::JOB_STATE_QUEUED) return -1;
  const base::MutexLock lock(mu_);
  ASSIGN_OR_RETURN(SqlStatement select,
                   database_->Prepare("SELECT count(*) FROM jobs WHERE state = 1 AND "
                                      "(priority > ?1 OR (priority = ?1 AND number < ?2))"));
  select.BindInteger(job.priority());
  select.BindInteger(job.number());
  RETURN_IF_ERROR(select.Step().status());
  return select.NextInteger();
}

absl::StatusOr<std::vector<JobRecord>> SqliteCatalog::OverdueJobs(base::UnixMicros now) {
  const base::MutexLock lock(mu_);
  return SelectRows<JobRecord>(*database_,
                               "WHERE state < 3 AND deadline_time > 0 AND deadline_time <= ?",
                               [&](SqlStatement& select) { select.BindInteger(now); });
}

absl::StatusOr<std::vector<JobRecord>> SqliteCatalog::ExpiredJobs(base::UnixMicros now) {
  const base::MutexLock lock(mu_);
  return SelectRows<JobRecord>(*database_, "WHERE state >= 3 AND expire_time <= ?",
                               [&](SqlStatement& select) { select.BindInteger(now); });
}

absl::StatusOr<std::optional<JobRecord>> SqliteCatalog::ClaimJob(
    const std::string& replica, const std::string& claim, const std::set<std::string>& without) {
  std::string first = "WHERE state = 1 AND owner = ''";
  for (size_t i = 0; i < without.size(); ++i) absl::StrAppend(&first, " AND tenant <> ?");
  absl::StrAppend(&first, " ORDER BY priority DESC, number LIMIT 1");
  std::optional<JobRecord> claimed;
  RETURN_IF_ERROR(Transact([&](SqlDatabase& database) -> absl::Status {
    // A repetition gets what it has claimed already.
    ASSIGN_OR_RETURN(
        std::vector<JobRecord> owned,
        SelectRows<JobRecord>(database, "WHERE owner <> '' AND owner = ?",
                              [&](SqlStatement& select) { select.BindText(replica); }));
    for (JobRecord& job : owned) {
      if (job.claim() != claim) continue;
      claimed = std::move(job);
      return absl::OkStatus();
    }
    ASSIGN_OR_RETURN(claimed,
                     SelectRow<JobRecord>(database, first.c_str(), [&](SqlStatement& select) {
                       for (const std::string& tenant : without) select.BindText(tenant);
                     }));
    if (!claimed.has_value()) return absl::OkStatus();
    ASSIGN_OR_RETURN(claimed, Claim(*std::move(claimed), replica, claim));
    return PutRow(database, *claimed);
  }));
  return claimed;
}

absl::StatusOr<JobChange> SqliteCatalog::Apply(
    Transaction transact, const std::string* tenant, const std::string& id,
    absl::FunctionRef<absl::StatusOr<JobRecord>(const JobRecord&)> event) {
  JobChange change;
  RETURN_IF_ERROR((this->*transact)([&](SqlDatabase& database) -> absl::Status {
    ASSIGN_OR_RETURN(const JobRecord before, ReadJob(database, tenant, id));
    ASSIGN_OR_RETURN(change.job, event(before));
    change.before = before.state();
    if (!change.job.has_weights()) change.weights = before.weights();
    change.changed = before.state() != change.job.state();
    return PutRow(database, change.job);
  }));
  return change;
}

absl::StatusOr<JobChange> SqliteCatalog::StartJob(const std::string& id, const std::string& claim,
                                                  base::UnixMicros now) {
  return Apply(&SqliteCatalog::Transact, nullptr, id,
               [&](const JobRecord& job) { return Start(job, claim, now); });
}

absl::StatusOr<JobChange> SqliteCatalog::ReleaseJob(const std::string& id,
                                                    const std::string& claim) {
  return Apply(&SqliteCatalog::TransactFreeing, nullptr, id,
               [&](const JobRecord& job) { return Release(job, claim); });
}

absl::StatusOr<JobChange> SqliteCatalog::FinishJob(const std::string& id, const std::string& claim,
                                                   const JobOutcome& outcome) {
  return Apply(&SqliteCatalog::TransactFreeing, nullptr, id,
               [&](const JobRecord& job) { return Finish(job, claim, outcome); });
}

absl::StatusOr<JobChange> SqliteCatalog::CancelJob(const std::string& tenant, const std::string& id,
                                                   const absl::Status& reason,
                                                   base::UnixMicros now) {
  return Apply(
      &SqliteCatalog::TransactFreeing, &tenant, id,
      [&](const JobRecord& job) -> absl::StatusOr<JobRecord> { return Cancel(job, reason, now); });
}

absl::StatusOr<JobRecord> SqliteCatalog::RemoveJob(const std::string& tenant,
                                                   const std::string& id) {
  JobRecord removed;
  RETURN_IF_ERROR(TransactFreeing([&](SqlDatabase& database) -> absl::Status {
    ASSIGN_OR_RETURN(removed, ReadJob(database, &tenant, id));
    RETURN_IF_ERROR(CheckRemovable(removed));
    return DeleteRow<JobRecord>(database, id);
  }));
  return removed;
}

}  // namespace

absl::StatusOr<std::unique_ptr<Catalog>> OpenSqliteCatalog(const std::shared_ptr<Disk>& disk,
                                                           const char* vfs,
                                                           std::shared_ptr<DiskReserve> reserve,
                                                           const std::string& accepted_loss,
                                                           absl::FunctionRef<SetAside> set_aside) {
  auto commits = std::make_unique<CommitsFile>(disk);
  ASSIGN_OR_RETURN(std::unique_ptr<SqlDatabase> database,
                   OpenDatabase(*disk, vfs, *commits, accepted_loss, set_aside));
  return std::make_unique<SqliteCatalog>(std::move(database), std::move(reserve),
                                         std::move(commits));
}

absl::StatusOr<std::unique_ptr<Catalog>> OpenMemoryCatalog() {
  ASSIGN_OR_RETURN(std::unique_ptr<SqlDatabase> database, OpenMemoryDatabase());
  return std::make_unique<SqliteCatalog>(std::move(database), nullptr, nullptr);
}

}  // namespace certiq::server
