#include "store/upgrade.h"

#include <bit>
#include <cstdint>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include "absl/strings/escaping.h"
#include "absl/strings/str_cat.h"
#include "base/status_macros.h"
#include "store/checksum.h"
#include "store/commits.h"
#include "store/rows.h"
#include "store/schema.h"

namespace certiq::server {
namespace {

// Reads the columns of a row of schema 1 in turn and digests them as that schema did: integers as
// eight bytes, strings after their lengths.
class Row {
 public:
  explicit Row(SqlStatement& statement) : statement_(statement) {}

  int64_t Integer() {
    const int64_t value = statement_.NextInteger();
    Digest(value);
    return value;
  }
  double Real() {
    const double value = statement_.NextReal();
    // -0 came back from SQLite as 0, and one NaN as another.
    Digest(value != value ? int64_t{-1} : std::bit_cast<int64_t>(value + 0.0));
    return value;
  }
  std::string Text() {
    std::string value = statement_.NextString();
    Digest(static_cast<int64_t>(value.size()));
    digested_ += value;
    return value;
  }
  void Digest(int64_t value) {
    const auto bits = static_cast<uint64_t>(value);
    for (int shift = 0; shift < 64; shift += 8)
      digested_.push_back(static_cast<char>(bits >> shift));
  }
  // The fields of a row that belongs to this one.
  void Digest(const Row& other) { digested_ += other.digested_; }
  int64_t Sum() const {
    return static_cast<int64_t>(Checksum(std::as_bytes(std::span(digested_)), 0));
  }

 private:
  SqlStatement& statement_;
  std::string digested_;
};

absl::Status Changed(const SqlDatabase& database, const char* what, const std::string& id) {
  return database.Damaged(
      absl::StrCat(what, " ", absl::CHexEscape(id), " is not what was written"));
}

BlobRef NextBlob(Row& row) {
  BlobRef blob;
  blob.set_name(row.Text());
  blob.set_bytes(row.Integer());
  return blob;
}

// Adds the labels or the streams of a calibration to its record and to the digest of its row.
absl::Status AddLabels(SqlDatabase& database, CalibrationRecord& record, Row& digest) {
  ASSIGN_OR_RETURN(SqlStatement select,
                   database.Prepare("SELECT label FROM calibration_labels_1 "
                                    "WHERE calibration_id = ? ORDER BY position"));
  select.BindText(record.id());
  Row row(select);
  for (;;) {
    ASSIGN_OR_RETURN(const bool more, select.Step());
    if (!more) break;
    record.add_labels(row.Text());
  }
  digest.Digest(record.labels_size());
  digest.Digest(row);
  return absl::OkStatus();
}

absl::Status AddStreams(SqlDatabase& database, CalibrationRecord& record, Row& digest) {
  ASSIGN_OR_RETURN(SqlStatement select,
                   database.Prepare("SELECT id, sequence, tokens, imported FROM "
                                    "calibration_streams_1 WHERE calibration_id = ? "
                                    "ORDER BY position"));
  select.BindText(record.id());
  Row row(select);
  for (;;) {
    ASSIGN_OR_RETURN(const bool more, select.Step());
    if (!more) break;
    StreamRecord& stream = *record.add_streams();
    stream.set_id(row.Text());
    stream.set_sequence(row.Integer());
    stream.set_tokens(row.Integer());
    stream.set_imported(row.Integer() != 0);
  }
  digest.Digest(record.streams_size());
  digest.Digest(row);
  return absl::OkStatus();
}

absl::Status UpgradeCalibrations(SqlDatabase& database) {
  ASSIGN_OR_RETURN(SqlStatement select, database.Prepare(R"sql(
SELECT id, tenant, request_id, request_digest, features, mismatched, held_out_fraction,
  held_out_block_rows, create_time, update_time, ttl_micros, finalize_time, tokens,
  held_out_tokens, sums_blob, sums_bytes, sums_sha256, checksum
FROM calibrations_1 ORDER BY id
)sql"));
  for (;;) {
    ASSIGN_OR_RETURN(const bool more, select.Step());
    if (!more) return absl::OkStatus();
    CalibrationRecord record;
    Row row(select);
    record.set_id(row.Text());
    record.set_tenant(row.Text());
    record.set_request_id(row.Text());
    record.set_request_digest(row.Text());
    record.set_features(row.Integer());
    record.set_mismatched(row.Integer() != 0);
    record.set_held_out_fraction(row.Real());
    record.set_held_out_block_rows(row.Integer());
    record.set_create_time(row.Integer());
    record.set_update_time(row.Integer());
    record.set_ttl_micros(row.Integer());
    record.set_finalize_time(row.Integer());
    record.set_tokens(row.Integer());
    record.set_held_out_tokens(row.Integer());
    const BlobRef sums = NextBlob(row);
    if (!sums.name().empty()) *record.mutable_sums() = sums;
    record.set_sums_sha256(row.Text());
    const int64_t sum = select.NextInteger();
    RETURN_IF_ERROR(AddLabels(database, record, row));
    RETURN_IF_ERROR(AddStreams(database, record, row));
    if (row.Sum() != sum) return Changed(database, "calibration", record.id());
    RETURN_IF_ERROR(PutRow(database, record));
  }
}

absl::Status UpgradeJobs(SqlDatabase& database) {
  ASSIGN_OR_RETURN(SqlStatement select, database.Prepare(R"sql(
SELECT id, tenant, request_id, request_digest, number, layer_name, calibration_id, spec, rows,
  features, weight_dtype, weights_sha256, weights_blob, weights_bytes, priority, create_time,
  start_time, end_time, deadline_time, ttl_micros, state, starts, error, result_blob,
  result_bytes, result_tensor_bytes, result_header, relative_error, lambda_used, checksum
FROM jobs_1 ORDER BY number
)sql"));
  for (;;) {
    ASSIGN_OR_RETURN(const bool more, select.Step());
    if (!more) return absl::OkStatus();
    JobRecord record;
    Row row(select);
    record.set_id(row.Text());
    record.set_tenant(row.Text());
    record.set_request_id(row.Text());
    record.set_request_digest(row.Text());
    record.set_number(row.Integer());
    record.set_layer_name(row.Text());
    record.set_calibration_id(row.Text());
    bool parsed = record.mutable_spec()->ParseFromString(row.Text());
    record.set_rows(row.Integer());
    record.set_features(row.Integer());
    // Types and states were numbered from 0 on, in the order that the contract has after its
    // UNSPECIFIED.
    record.set_weight_dtype(static_cast<v1::DataType>(row.Integer() + 1));
    record.set_weights_sha256(row.Text());
    const BlobRef weights = NextBlob(row);
    if (!weights.name().empty()) *record.mutable_weights() = weights;
    record.set_priority(static_cast<int32_t>(row.Integer()));
    record.set_create_time(row.Integer());
    record.set_start_time(row.Integer());
    record.set_end_time(row.Integer());
    record.set_deadline_time(row.Integer());
    record.set_ttl_micros(row.Integer());
    record.set_state(static_cast<JobState>(row.Integer() + 1));
    record.set_starts(static_cast<int32_t>(row.Integer()));
    if (const std::string error = row.Text(); !error.empty()) {
      parsed = record.mutable_error()->ParseFromString(error) && parsed;
    }
    ResultRecord result;
    *result.mutable_blob() = NextBlob(row);
    result.set_tensor_bytes(row.Integer());
    parsed = result.mutable_header()->ParseFromString(row.Text()) && parsed;
    result.set_relative_error(row.Real());
    result.set_lambda_used(row.Real());
    if (!result.blob().name().empty()) *record.mutable_result() = std::move(result);
    if (!parsed || row.Sum() != select.NextInteger()) {
      return Changed(database, "job", record.id());
    }
    RETURN_IF_ERROR(PutRow(database, record));
  }
}

}  // namespace

absl::Status UpgradeFromSchema1(SqlDatabase& database, const std::string& lineage) {
  static_assert(kSchemaVersion == 2);
  const auto upgrade = [&]() -> absl::Status {
    for (const char* const table :
         {"calibration_labels", "calibration_streams", "calibrations", "jobs"}) {
      const std::string sql = absl::StrCat("ALTER TABLE ", table, " RENAME TO ", table, "_1");
      // Prepared, so that a table that is not there is told as damage.
      ASSIGN_OR_RETURN(SqlStatement rename, database.Prepare(sql.c_str()));
      RETURN_IF_ERROR(rename.Run());
    }
    RETURN_IF_ERROR(database.Run(kCreateTables));
    RETURN_IF_ERROR(UpgradeCalibrations(database));
    RETURN_IF_ERROR(UpgradeJobs(database));
    RETURN_IF_ERROR(CreateCommits(database, lineage));
    return database.Run(
        "DROP TABLE calibration_labels_1;"
        "DROP TABLE calibration_streams_1;"
        "DROP TABLE calibrations_1;"
        "DROP TABLE jobs_1;"
        "PRAGMA user_version = 2;"
        "COMMIT");
  };
  RETURN_IF_ERROR(database.Run("BEGIN IMMEDIATE"));
  absl::Status status = upgrade();
  if (!status.ok() && database.in_transaction()) database.Run("ROLLBACK").IgnoreError();
  return status;
}

}  // namespace certiq::server
