#include "store/rows.h"

#include <set>
#include <span>
#include <string>
#include <utility>

#include "absl/strings/escaping.h"
#include "absl/strings/str_cat.h"
#include "base/status_macros.h"
#include "store/checksum.h"

namespace certiq::server {
namespace {

// What a table is called, and its columns after version and checksum, in the order of Columns.
template <typename Record>
struct Table;

template <>
struct Table<CalibrationRecord> {
  static constexpr char kWhat[] = "calibration";
  static constexpr char kName[] = "calibrations";
  static constexpr char kColumns[] = "id, tenant, request_id, create_time, expire_time";
  static constexpr char kPut[] = R"sql(
INSERT INTO calibrations (id, tenant, request_id, create_time, expire_time, checksum, body, version)
VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7, 1)
ON CONFLICT (id) DO UPDATE SET tenant = ?2, request_id = ?3, create_time = ?4, expire_time = ?5,
  checksum = ?6, body = ?7, version = version + 1
)sql";

  template <typename Column>
  static void Columns(const CalibrationRecord& record, Column& column) {
    column.Text(record.id());
    column.Text(record.tenant());
    column.Text(record.request_id());
    column.Integer(record.create_time());
    column.Integer(ExpireTime(record));
  }
};

template <>
struct Table<JobRecord> {
  static constexpr char kWhat[] = "job";
  static constexpr char kName[] = "jobs";
  static constexpr char kColumns[] =
      "number, id, tenant, request_id, calibration_id, state, priority, owner, create_time, "
      "deadline_time, expire_time";
  static constexpr char kPut[] = R"sql(
INSERT INTO jobs (number, id, tenant, request_id, calibration_id, state, priority, owner,
  create_time, deadline_time, expire_time, checksum, body, version)
VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8, ?9, ?10, ?11, ?12, ?13, 1)
ON CONFLICT (number) DO UPDATE SET id = ?2, tenant = ?3, request_id = ?4, calibration_id = ?5,
  state = ?6, priority = ?7, owner = ?8, create_time = ?9, deadline_time = ?10, expire_time = ?11,
  checksum = ?12, body = ?13, version = version + 1
)sql";

  template <typename Column>
  static void Columns(const JobRecord& record, Column& column) {
    column.Integer(record.number());
    column.Text(record.id());
    column.Text(record.tenant());
    column.Text(record.request_id());
    column.Text(record.calibration_id());
    column.Integer(record.state());
    column.Integer(record.priority());
    column.Text(record.owner());
    column.Integer(record.create_time());
    column.Integer(record.deadline_time());
    column.Integer(ExpireTime(record));
  }
};

struct Binder {
  SqlStatement& statement;
  void Integer(int64_t value) { statement.BindInteger(value); }
  void Text(const std::string& value) { statement.BindText(value); }
};

// Whether the columns of a row say what its body does.
struct Comparer {
  SqlStatement& row;
  bool same = true;
  void Integer(int64_t value) { same = (row.NextInteger() == value) && same; }
  void Text(const std::string& value) { same = (row.NextString() == value) && same; }
};

int64_t SumOf(const std::string& body) {
  return static_cast<int64_t>(Checksum(std::as_bytes(std::span(body)), 0));
}

template <typename Record>
absl::Status Put(SqlDatabase& database, const Record& record) {
  ASSIGN_OR_RETURN(SqlStatement put, database.Prepare(Table<Record>::kPut));
  Binder binder{put};
  Table<Record>::Columns(record, binder);
  const std::string body = record.SerializeAsString();
  put.BindInteger(SumOf(body));
  put.BindBlob(body);
  return put.Run();
}

}  // namespace

absl::Status PutRow(SqlDatabase& database, const CalibrationRecord& record) {
  RETURN_IF_ERROR(Put(database, record));
  // Labels never change: a row that is written again finds its own.
  ASSIGN_OR_RETURN(SqlStatement insert,
                   database.Prepare("INSERT OR IGNORE INTO calibration_labels VALUES (?, ?)"));
  for (const std::string& label : record.labels()) {
    insert.BindText(record.id());
    insert.BindText(label);
    RETURN_IF_ERROR(insert.Run());
  }
  return absl::OkStatus();
}

absl::Status PutRow(SqlDatabase& database, const JobRecord& record) {
  return Put(database, record);
}

template <typename Record>
absl::StatusOr<std::vector<Record>> SelectRows(SqlDatabase& database, const char* where,
                                               absl::FunctionRef<void(SqlStatement&)> bind,
                                               int64_t max_bytes) {
  const std::string sql = absl::StrCat("SELECT checksum, body, ", Table<Record>::kColumns, " FROM ",
                                       Table<Record>::kName, " ", where);
  ASSIGN_OR_RETURN(SqlStatement select, database.Prepare(sql.c_str()));
  bind(select);
  std::vector<Record> records;
  int64_t bytes = 0;
  while (bytes <= max_bytes) {
    ASSIGN_OR_RETURN(const bool more, select.Step());
    if (!more) break;
    const int64_t sum = select.NextInteger();
    const std::string body = select.NextString();
    bytes += static_cast<int64_t>(body.size());
    Record& record = records.emplace_back();
    bool whole = sum == SumOf(body) && record.ParseFromString(body);
    if (whole) {
      Comparer comparer{select};
      Table<Record>::Columns(record, comparer);
      whole = comparer.same;
    }
    if (!whole) {
      return database.Damaged(absl::StrCat(Table<Record>::kWhat, " ", absl::CHexEscape(record.id()),
                                           " is not what was written"));
    }
  }
  return records;
}
template absl::StatusOr<std::vector<CalibrationRecord>> SelectRows(
    SqlDatabase& database, const char* where, absl::FunctionRef<void(SqlStatement&)> bind,
    int64_t max_bytes);
template absl::StatusOr<std::vector<JobRecord>> SelectRows(
    SqlDatabase& database, const char* where, absl::FunctionRef<void(SqlStatement&)> bind,
    int64_t max_bytes);

absl::Status CheckLabels(SqlDatabase& database,
                         const std::vector<CalibrationRecord>& calibrations) {
  std::set<std::pair<std::string, std::string>> labels;
  for (const CalibrationRecord& record : calibrations) {
    for (const std::string& label : record.labels()) labels.emplace(record.id(), label);
  }
  ASSIGN_OR_RETURN(SqlStatement select,
                   database.Prepare("SELECT calibration_id, label FROM calibration_labels"));
  for (;;) {
    ASSIGN_OR_RETURN(const bool more, select.Step());
    if (!more) break;
    const std::string id = select.NextString();
    const std::string label = select.NextString();
    if (labels.erase({id, label}) == 0) {
      return database.Damaged(
          absl::StrCat("calibration ", absl::CHexEscape(id), " has a label that was not written"));
    }
  }
  if (labels.empty()) return absl::OkStatus();
  return database.Damaged(
      absl::StrCat("calibration ", absl::CHexEscape(labels.begin()->first), " has lost a label"));
}

template <typename Record>
absl::Status DeleteRow(SqlDatabase& database, const std::string& id) {
  const std::string sql = absl::StrCat("DELETE FROM ", Table<Record>::kName, " WHERE id = ?");
  ASSIGN_OR_RETURN(SqlStatement statement, database.Prepare(sql.c_str()));
  statement.BindText(id);
  return statement.Run();
}
template absl::Status DeleteRow<CalibrationRecord>(SqlDatabase& database, const std::string& id);
template absl::Status DeleteRow<JobRecord>(SqlDatabase& database, const std::string& id);

}  // namespace certiq::server
