// SQLite's handles with owners, and its errors as statuses.

#ifndef CERTIQ_STORE_SQLITE_H_
#define CERTIQ_STORE_SQLITE_H_

#include <cstdint>
#include <memory>
#include <string>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"

struct sqlite3;
struct sqlite3_stmt;

namespace certiq::server {

// One prepared statement. The database outlives it.
class SqlStatement {
 public:
  // Sets the parameters in turn, the first after construction or Reset. An error is told by Step.
  // The bytes must live until the next Reset.
  void BindInteger(int64_t value);
  // NaN becomes NULL.
  void BindReal(double value);
  void BindText(absl::string_view value);
  void BindBlob(absl::string_view value);

  // True: there is a row. False: it is done.
  absl::StatusOr<bool> Step();
  // For what gives no rows: Step, then Reset.
  absl::Status Run();
  void Reset();

  // Reads the columns of the row in turn, whatever was written.
  int64_t NextInteger();
  double NextReal();
  std::string NextString();

 private:
  friend class SqlDatabase;
  struct Finalize {
    void operator()(sqlite3_stmt* statement) const;
  };
  class SqlDatabase* database_ = nullptr;
  std::unique_ptr<sqlite3_stmt, Finalize> statement_;
  int next_parameter_ = 1;
  int next_column_ = 0;
  // The code of the first Bind that failed; 0 if none.
  int bind_error_ = 0;
};

// A connection. Not thread-safe.
class SqlDatabase {
 public:
  // `name` stands for the file in messages. `vfs`: nullptr for the default. No part of the path may
  // be a symbolic link.
  static absl::StatusOr<std::unique_ptr<SqlDatabase>> Open(const std::string& path,
                                                           std::string name, const char* vfs);
  // To read what is there and to leave all files as they are. `with_log`: there is a log beside it.
  static absl::StatusOr<std::unique_ptr<SqlDatabase>> OpenToLook(const std::string& path,
                                                                 std::string name, const char* vfs,
                                                                 bool with_log);

  // Whether the log is written into the database and removed when it is closed, as it is unless
  // said otherwise.
  void EmptyLogOnClose(bool empty);

  // Runs constant SQL that gives no rows.
  absl::Status Run(const char* sql);
  // The number in the first column of the first row.
  absl::StatusOr<int64_t> Number(const char* sql);
  absl::StatusOr<std::string> Text(const char* sql);
  absl::StatusOr<SqlStatement> Prepare(const char* sql);

  bool in_transaction() const;
  // Rows that were written or deleted since it was opened.
  int64_t changes() const;

  // What a result code means: RESOURCE_EXHAUSTED or UNAVAILABLE with a retry delay, DATA_LOSS,
  // or INTERNAL for what only a mistake of ours can cause. Right after the call that gave it, whose
  // errno it reads.
  absl::Status Error(int code) const;
  absl::Status Damaged(absl::string_view why) const;

 private:
  explicit SqlDatabase(std::string name) : name_(std::move(name)) {}
  static absl::StatusOr<std::unique_ptr<SqlDatabase>> Open(const std::string& path,
                                                           std::string name, const char* vfs,
                                                           int flags);
  struct Close {
    void operator()(sqlite3* database) const;
  };
  const std::string name_;
  std::unique_ptr<sqlite3, Close> database_;
};

}  // namespace certiq::server

#endif  // CERTIQ_STORE_SQLITE_H_
