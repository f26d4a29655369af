#include "store/sqlite.h"

#include <sqlite3.h>

#include <cerrno>
#include <limits>
#include <system_error>
#include <utility>

#include "absl/strings/ascii.h"
#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "base/status.h"
#include "base/status_macros.h"

namespace certiq::server {
namespace {

// For a program that looks at the database from outside.
constexpr int kBusyMilliseconds = 5000;

bool IsFull(int code, int error) {
  const int primary = code & 0xff;
  if (primary == SQLITE_FULL || primary == SQLITE_NOMEM || code == SQLITE_IOERR_NOMEM) return true;
  return (primary == SQLITE_IOERR || primary == SQLITE_CANTOPEN) &&
         (error == ENOSPC || error == EDQUOT || error == EFBIG);
}

absl::StatusCode CodeOf(int code, int error) {
  if (IsFull(code, error)) return absl::StatusCode::kResourceExhausted;
  if (code == SQLITE_IOERR_CORRUPTFS || code == SQLITE_IOERR_DATA) {
    return absl::StatusCode::kDataLoss;
  }
  switch (code & 0xff) {
    case SQLITE_CORRUPT:
    case SQLITE_NOTADB:
    case SQLITE_FORMAT:
      return absl::StatusCode::kDataLoss;
    case SQLITE_BUSY:
    case SQLITE_CANTOPEN:
    case SQLITE_IOERR:
    case SQLITE_LOCKED:
    case SQLITE_PERM:
    case SQLITE_PROTOCOL:
    case SQLITE_READONLY:
      return absl::StatusCode::kUnavailable;
    default:
      return absl::StatusCode::kInternal;
  }
}

// A path as a part of a URI.
std::string UriPath(const std::string& path) {
  std::string encoded;
  for (const char c : path) {
    if (absl::ascii_isalnum(static_cast<unsigned char>(c)) || absl::StrContains("/._-", c)) {
      encoded += c;
    } else {
      absl::StrAppend(&encoded, "%", absl::Hex(static_cast<unsigned char>(c), absl::kZeroPad2));
    }
  }
  return encoded;
}

}  // namespace

void SqlStatement::Finalize::operator()(sqlite3_stmt* statement) const {
  sqlite3_finalize(statement);
}

void SqlStatement::BindInteger(int64_t value) {
  const int code = sqlite3_bind_int64(statement_.get(), next_parameter_++, value);
  if (bind_error_ == SQLITE_OK) bind_error_ = code;
}

void SqlStatement::BindReal(double value) {
  const int code = sqlite3_bind_double(statement_.get(), next_parameter_++, value);
  if (bind_error_ == SQLITE_OK) bind_error_ = code;
}

void SqlStatement::BindText(absl::string_view value) {
  // A null pointer would bind NULL.
  const char* data = value.empty() ? "" : value.data();
  const int code = sqlite3_bind_text64(statement_.get(), next_parameter_++, data, value.size(),
                                       SQLITE_STATIC, SQLITE_UTF8);
  if (bind_error_ == SQLITE_OK) bind_error_ = code;
}

void SqlStatement::BindBlob(absl::string_view value) {
  const char* data = value.empty() ? "" : value.data();
  const int code =
      sqlite3_bind_blob64(statement_.get(), next_parameter_++, data, value.size(), SQLITE_STATIC);
  if (bind_error_ == SQLITE_OK) bind_error_ = code;
}

absl::StatusOr<bool> SqlStatement::Step() {
  next_column_ = 0;
  if (bind_error_ != SQLITE_OK) return database_->Error(bind_error_);
  errno = 0;
  const int code = sqlite3_step(statement_.get());
  if (code == SQLITE_ROW || code == SQLITE_DONE) return code == SQLITE_ROW;
  absl::Status status = database_->Error(code);
  sqlite3_reset(statement_.get());
  return status;
}

absl::Status SqlStatement::Run() {
  absl::Status status = Step().status();
  Reset();
  return status;
}

void SqlStatement::Reset() {
  sqlite3_reset(statement_.get());
  sqlite3_clear_bindings(statement_.get());
  next_parameter_ = 1;
  bind_error_ = SQLITE_OK;
}

int64_t SqlStatement::NextInteger() {
  return sqlite3_column_int64(statement_.get(), next_column_++);
}

double SqlStatement::NextReal() {
  const int column = next_column_++;
  if (sqlite3_column_type(statement_.get(), column) == SQLITE_NULL) {
    return std::numeric_limits<double>::quiet_NaN();
  }
  return sqlite3_column_double(statement_.get(), column);
}

std::string SqlStatement::NextString() {
  const int column = next_column_++;
  // Gives the bytes of texts, too.
  const auto* data = static_cast<const char*>(sqlite3_column_blob(statement_.get(), column));
  const int size = sqlite3_column_bytes(statement_.get(), column);
  return data == nullptr ? std::string() : std::string(data, static_cast<size_t>(size));
}

void SqlDatabase::Close::operator()(sqlite3* database) const { sqlite3_close(database); }

absl::StatusOr<std::unique_ptr<SqlDatabase>> SqlDatabase::Open(const std::string& path,
                                                               std::string name, const char* vfs,
                                                               int flags) {
  std::unique_ptr<SqlDatabase> database(new SqlDatabase(std::move(name)));
  sqlite3* handle = nullptr;
  errno = 0;
  const int code = sqlite3_open_v2(path.c_str(), &handle,
                                   flags | SQLITE_OPEN_NOMUTEX | SQLITE_OPEN_NOFOLLOW, vfs);
  database->database_.reset(handle);
  if (code != SQLITE_OK) return database->Error(code);
  sqlite3_extended_result_codes(handle, 1);
  sqlite3_busy_timeout(handle, kBusyMilliseconds);
  return database;
}

absl::StatusOr<std::unique_ptr<SqlDatabase>> SqlDatabase::Open(const std::string& path,
                                                               std::string name, const char* vfs) {
  return Open(path, std::move(name), vfs, SQLITE_OPEN_READWRITE | SQLITE_OPEN_CREATE);
}

absl::StatusOr<std::unique_ptr<SqlDatabase>> SqlDatabase::OpenToLook(const std::string& path,
                                                                     std::string name,
                                                                     const char* vfs,
                                                                     bool with_log) {
  if (!with_log) {
    // Otherwise a log is made where there is none.
    return Open(absl::StrCat("file:", UriPath(path), "?immutable=1"), std::move(name), vfs,
                SQLITE_OPEN_READONLY | SQLITE_OPEN_URI);
  }
  // To write, as a log is not read otherwise.
  ASSIGN_OR_RETURN(std::unique_ptr<SqlDatabase> database,
                   Open(path, std::move(name), vfs, SQLITE_OPEN_READWRITE));
  database->EmptyLogOnClose(false);
  // Its index is kept in memory then, and in no file.
  RETURN_IF_ERROR(database->Run("PRAGMA locking_mode = EXCLUSIVE"));
  return database;
}

void SqlDatabase::EmptyLogOnClose(bool empty) {
  sqlite3_db_config(database_.get(), SQLITE_DBCONFIG_NO_CKPT_ON_CLOSE, empty ? 0 : 1, nullptr);
}

absl::Status SqlDatabase::Run(const char* sql) {
  errno = 0;
  const int code = sqlite3_exec(database_.get(), sql, nullptr, nullptr, nullptr);
  return code == SQLITE_OK ? absl::OkStatus() : Error(code);
}

absl::StatusOr<int64_t> SqlDatabase::Number(const char* sql) {
  ASSIGN_OR_RETURN(SqlStatement statement, Prepare(sql));
  ASSIGN_OR_RETURN(const bool row, statement.Step());
  return row ? statement.NextInteger() : 0;
}

absl::StatusOr<std::string> SqlDatabase::Text(const char* sql) {
  ASSIGN_OR_RETURN(SqlStatement statement, Prepare(sql));
  ASSIGN_OR_RETURN(const bool row, statement.Step());
  return row ? statement.NextString() : std::string();
}

absl::StatusOr<SqlStatement> SqlDatabase::Prepare(const char* sql) {
  sqlite3_stmt* handle = nullptr;
  errno = 0;
  const int code = sqlite3_prepare_v2(database_.get(), sql, -1, &handle, nullptr);
  SqlStatement statement;
  statement.database_ = this;
  statement.statement_.reset(handle);
  if (code == SQLITE_OK) return statement;
  // Our SQL is constant: if it does not fit the tables, they have changed.
  return code == SQLITE_ERROR ? Damaged(sqlite3_errmsg(database_.get())) : Error(code);
}

bool SqlDatabase::in_transaction() const { return sqlite3_get_autocommit(database_.get()) == 0; }

int64_t SqlDatabase::changes() const { return sqlite3_total_changes64(database_.get()); }

absl::Status SqlDatabase::Error(int code) const {
  // sqlite3_system_errno() is the same, but not told of a COMMIT that fails.
  const int error = errno;
  const bool says_errno = (code & 0xff) == SQLITE_IOERR || (code & 0xff) == SQLITE_CANTOPEN;
  absl::Status status(
      CodeOf(code, error),
      absl::StrCat(name_, ": ",
                   // Without a handle there was no memory for it.
                   database_ == nullptr ? sqlite3_errstr(code) : sqlite3_errmsg(database_.get()),
                   " (", code, ")",
                   says_errno && error != 0
                       ? absl::StrCat(": ", std::generic_category().message(error))
                       : ""));
  if (absl::IsResourceExhausted(status) || absl::IsUnavailable(status)) {
    base::SetRetryAfter(status, base::kRetrySoon);
  }
  return status;
}

absl::Status SqlDatabase::Damaged(absl::string_view why) const {
  return absl::DataLossError(absl::StrCat(name_, ": ", why));
}

}  // namespace certiq::server
