#include "store/records.h"

#include <bit>
#include <string>
#include <utility>

#include "absl/strings/escaping.h"
#include "absl/strings/str_cat.h"
#include "store/checksum.h"
#include "store/schema.h"

namespace certiq::server {
namespace {

// Each Visit passes all columns of a row in turn. `Record` is const or not, as `field` needs it.

template <typename Field, typename Record>
void VisitStream(Record& record, Field& field) {
  field.Text(record.id);
  field.Integer(record.sequence);
  field.Integer(record.tokens);
  field.Integer(record.imported);
}

// All but labels and streams.
template <typename Field, typename Record>
void VisitCalibration(Record& record, Field& field) {
  field.Text(record.id);
  field.Text(record.tenant);
  field.Text(record.request_id);
  field.Text(record.request_digest);
  field.Integer(record.features);
  field.Integer(record.mismatched);
  field.Real(record.held_out_fraction);
  field.Integer(record.held_out_block_rows);
  field.Integer(record.create_time);
  field.Integer(record.update_time);
  field.Integer(record.ttl_micros);
  field.Integer(record.finalize_time);
  field.Integer(record.tokens);
  field.Integer(record.held_out_tokens);
  field.Text(record.sums.name);
  field.Integer(record.sums.bytes);
  field.Text(record.sums_sha256);
}

template <typename Field, typename Record>
void VisitJob(Record& record, Field& field) {
  field.Text(record.id);
  field.Text(record.tenant);
  field.Text(record.request_id);
  field.Text(record.request_digest);
  field.Integer(record.number);
  field.Text(record.layer_name);
  field.Text(record.calibration_id);
  field.Blob(record.spec);
  field.Integer(record.rows);
  field.Integer(record.features);
  field.Integer(record.weight_dtype);
  field.Text(record.weights_sha256);
  field.Text(record.weights.name);
  field.Integer(record.weights.bytes);
  field.Integer(record.priority);
  field.Integer(record.create_time);
  field.Integer(record.start_time);
  field.Integer(record.end_time);
  field.Integer(record.deadline_time);
  field.Integer(record.ttl_micros);
  field.Integer(record.state);
  field.Integer(record.starts);
  field.Blob(record.error);
  field.Text(record.result.name);
  field.Integer(record.result.bytes);
  field.Integer(record.result_tensor_bytes);
  field.Blob(record.result_header);
  field.Real(record.relative_error);
  field.Real(record.lambda_used);
}

struct Writer {
  SqlStatement& statement;

  template <typename Number>
  void Integer(Number value) {
    statement.BindInteger(static_cast<int64_t>(value));
  }
  void Real(double value) { statement.BindReal(value); }
  void Text(const std::string& value) { statement.BindText(value); }
  void Blob(const std::string& value) { statement.BindBlob(value); }
};

struct Reader {
  SqlStatement& statement;

  // What no longer fits its type either reads as another value, which the checksum finds, or not.
  template <typename Number>
  void Integer(Number& value) {
    value = static_cast<Number>(statement.NextInteger());
  }
  void Real(double& value) { value = statement.NextReal(); }
  void Text(std::string& value) { value = statement.NextString(); }
  void Blob(std::string& value) { value = statement.NextString(); }
};

// All fields as one string; strings after their lengths, so that no two records share it.
struct Digest {
  std::string bytes;

  template <typename Number>
  void Integer(Number value) {
    const auto bits = static_cast<uint64_t>(static_cast<int64_t>(value));
    for (int shift = 0; shift < 64; shift += 8) bytes.push_back(static_cast<char>(bits >> shift));
  }
  // -0 comes back from SQLite as 0, and one NaN as another.
  void Real(double value) {
    Integer(value != value ? int64_t{-1} : std::bit_cast<int64_t>(value + 0.0));
  }
  void Text(const std::string& value) {
    Integer(value.size());
    bytes += value;
  }
  void Blob(const std::string& value) { Text(value); }

  int64_t Sum() const { return static_cast<int64_t>(Checksum(std::as_bytes(std::span(bytes)), 0)); }
};

int64_t SumOf(const CalibrationRecord& record) {
  Digest digest;
  VisitCalibration(record, digest);
  digest.Integer(record.labels.size());
  for (const std::string& label : record.labels) digest.Text(label);
  digest.Integer(record.streams.size());
  for (const StreamRecord& stream : record.streams) VisitStream(stream, digest);
  return digest.Sum();
}

int64_t SumOf(const JobRecord& record) {
  Digest digest;
  VisitJob(record, digest);
  return digest.Sum();
}

absl::Status InsertLabels(SqlDatabase& database, const CalibrationRecord& record) {
  absl::StatusOr<SqlStatement> insert = database.Prepare(kInsertLabel);
  if (!insert.ok()) return insert.status();
  int64_t position = 0;
  for (const std::string& label : record.labels) {
    insert->BindText(record.id);
    insert->BindInteger(position++);
    insert->BindText(label);
    if (absl::Status status = insert->Run(); !status.ok()) return status;
  }
  return absl::OkStatus();
}

absl::Status InsertStreams(SqlDatabase& database, const CalibrationRecord& record) {
  absl::StatusOr<SqlStatement> insert = database.Prepare(kInsertStream);
  if (!insert.ok()) return insert.status();
  int64_t position = 0;
  for (const StreamRecord& stream : record.streams) {
    insert->BindText(record.id);
    insert->BindInteger(position++);
    Writer writer{*insert};
    VisitStream(stream, writer);
    if (absl::Status status = insert->Run(); !status.ok()) return status;
  }
  return absl::OkStatus();
}

// Calls `row` for each row of a query about calibration `id`.
template <typename Function>
absl::Status ForEachRow(SqlDatabase& database, const char* sql, const std::string& id,
                        Function row) {
  absl::StatusOr<SqlStatement> select = database.Prepare(sql);
  if (!select.ok()) return select.status();
  select->BindText(id);
  for (;;) {
    const absl::StatusOr<bool> more = select->Step();
    if (!more.ok()) return more.status();
    if (!*more) return absl::OkStatus();
    row(*select);
  }
}

absl::Status SelectCalibrations(SqlDatabase& database, std::vector<CalibrationRecord>& records) {
  absl::StatusOr<SqlStatement> select = database.Prepare(kSelectCalibrations);
  if (!select.ok()) return select.status();
  for (;;) {
    const absl::StatusOr<bool> more = select->Step();
    if (!more.ok()) return more.status();
    if (!*more) return absl::OkStatus();
    CalibrationRecord& record = records.emplace_back();
    Reader reader{*select};
    VisitCalibration(record, reader);
    const int64_t sum = select->NextInteger();
    absl::Status status = ForEachRow(database, kSelectLabels, record.id, [&](SqlStatement& row) {
      record.labels.push_back(row.NextString());
    });
    if (!status.ok()) return status;
    status = ForEachRow(database, kSelectStreams, record.id, [&](SqlStatement& row) {
      Reader stream{row};
      VisitStream(record.streams.emplace_back(), stream);
    });
    if (!status.ok()) return status;
    if (sum != SumOf(record)) {
      return database.Damaged(
          absl::StrCat("calibration ", absl::CHexEscape(record.id), " is not what was written"));
    }
  }
}

absl::Status SelectJobs(SqlDatabase& database, std::vector<JobRecord>& records) {
  absl::StatusOr<SqlStatement> select = database.Prepare(kSelectJobs);
  if (!select.ok()) return select.status();
  for (;;) {
    const absl::StatusOr<bool> more = select->Step();
    if (!more.ok()) return more.status();
    if (!*more) return absl::OkStatus();
    JobRecord& record = records.emplace_back();
    Reader reader{*select};
    VisitJob(record, reader);
    if (select->NextInteger() != SumOf(record)) {
      return database.Damaged(
          absl::StrCat("job ", absl::CHexEscape(record.id), " is not what was written"));
    }
  }
}

}  // namespace

absl::Status InsertCalibration(SqlDatabase& database, const CalibrationRecord& record) {
  absl::StatusOr<SqlStatement> insert = database.Prepare(kInsertCalibration);
  if (!insert.ok()) return insert.status();
  Writer writer{*insert};
  VisitCalibration(record, writer);
  insert->BindInteger(SumOf(record));
  if (absl::Status status = insert->Run(); !status.ok()) return status;
  if (absl::Status status = InsertLabels(database, record); !status.ok()) return status;
  return InsertStreams(database, record);
}

absl::Status InsertJob(SqlDatabase& database, const JobRecord& record) {
  absl::StatusOr<SqlStatement> insert = database.Prepare(kInsertJob);
  if (!insert.ok()) return insert.status();
  Writer writer{*insert};
  VisitJob(record, writer);
  insert->BindInteger(SumOf(record));
  return insert->Run();
}

absl::StatusOr<StoredState> SelectAll(SqlDatabase& database) {
  StoredState state;
  if (absl::Status status = SelectCalibrations(database, state.calibrations); !status.ok()) {
    return status;
  }
  if (absl::Status status = SelectJobs(database, state.jobs); !status.ok()) return status;
  return state;
}

}  // namespace certiq::server
