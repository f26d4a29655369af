// The commits: how many changes the records have seen, kept in the database and again beside it.
//
// SQLite believes its log up to the first frame whose checksum is wrong and drops the rest, and it
// reads a log on top of whatever database lies beside it. Either way records go back in time, and
// what they named would be removed as nobody's. So the table `commits` counts every change of a
// record and holds a digest of all of them, changed by triggers in the transaction of the change,
// and the file `commits` holds the number that was reached before anybody was told. A number below
// the file's, or a digest that is not that of the records, is a loss.

#ifndef CERTIQ_STORE_COMMITS_H_
#define CERTIQ_STORE_COMMITS_H_

#include <cstddef>
#include <cstdint>
#include <memory>
#include <optional>
#include <string>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "store/disk.h"
#include "store/sqlite.h"

namespace certiq::server {

inline constexpr char kCommitsName[] = "commits";
// The file before it is whole.
inline constexpr char kNewCommitsName[] = "commits.new";

struct Commits {
  // A random name of the history that the number counts in: another database has another.
  std::string lineage;
  int64_t number = 0;
};

// A new name.
std::string NewLineage();

// The file: two copies of
//
//   8 bytes "certiqC1", 32 of the lineage, 8 of the number, 8 of the checksum of those
//
// 4096 bytes apart and written in turn, so that a write that is cut short leaves the other. Not
// thread-safe.
class CommitsFile {
 public:
  explicit CommitsFile(std::shared_ptr<Disk> disk) : disk_(std::move(disk)) {}

  // Whether the file, which is there, was made by a server, damaged or not.
  static absl::StatusOr<bool> IsOne(Disk& disk);

  // What was written last; nothing where there is no file. DATA_LOSS where neither copy is whole.
  absl::StatusOr<std::optional<Commits>> Read();
  // Makes it anew, durably. The old one stays until the new one is whole.
  absl::Status Create(const Commits& commits);

  // The number that the file holds, or would hold had Advance not failed.
  int64_t number() const { return commits_.number; }
  // Writes a number, durably; it takes no space. REQUIRES: it was read or created.
  absl::Status Advance(int64_t number);
  // Repeats an Advance that failed.
  absl::Status CatchUp() { return behind_ ? Advance(commits_.number) : absl::OkStatus(); }

 private:
  const std::shared_ptr<Disk> disk_;
  DiskFile file_;
  Commits commits_;
  bool behind_ = false;
  // Where the copy is that is written next.
  int64_t next_ = 0;
};

// The table's one row.
struct CommitsRow {
  Commits commits;
  int64_t digest = 0;
};

// Nothing where there is no such table.
absl::StatusOr<std::optional<CommitsRow>> ReadCommits(SqlDatabase& database);
// The number alone. REQUIRES: there is a row.
absl::StatusOr<int64_t> ReadCommitNumber(SqlDatabase& database);
// Makes the table, of the records that are there. REQUIRES: a transaction is open.
absl::Status CreateCommits(SqlDatabase& database, const std::string& lineage);
// Makes the row one of these records. REQUIRES: a transaction is open.
absl::Status ResetCommits(SqlDatabase& database, const Commits& commits);

// Why the records are not those that clients were told of, and the code by which somebody says that
// this loss, and no other, is known.
struct Loss {
  std::string what;
  std::string code;
};

// Compares the row, null where there is no such table, with the file. REQUIRES: the file was read;
// an error that it gave is a loss if it is DATA_LOSS.
absl::StatusOr<std::optional<Loss>> FindLoss(SqlDatabase& database,
                                             const absl::StatusOr<std::optional<Commits>>& beside);
// The loss of the database as a whole; nothing where there was nothing to lose.
std::optional<Loss> FindLossOfAll(const absl::StatusOr<std::optional<Commits>>& beside);
// What a start says to a loss: DATA_LOSS with what can be done.
absl::Status LossError(const Loss& loss, const std::string& accepted);

}  // namespace certiq::server

#endif  // CERTIQ_STORE_COMMITS_H_
