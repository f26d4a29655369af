// The tables of state.db and the statements on them. The columns of a record come in the order in
// which records.h visits its fields, its checksum last.

#ifndef CERTIQ_STORE_SCHEMA_H_
#define CERTIQ_STORE_SCHEMA_H_

#include <cstdint>

namespace certiq::server {

// In PRAGMA user_version. A change of the tables raises it and brings the older ones along.
inline constexpr int64_t kSchemaVersion = 1;

// Without row ids there are no indexes beside the tables that could contradict them. A REAL may
// be NULL, which stands for NaN.
inline constexpr char kCreateTables[] = R"sql(
CREATE TABLE calibrations (
  id TEXT PRIMARY KEY,
  tenant TEXT NOT NULL,
  request_id TEXT NOT NULL,
  request_digest TEXT NOT NULL,
  features INTEGER NOT NULL,
  mismatched INTEGER NOT NULL,
  held_out_fraction REAL,
  held_out_block_rows INTEGER NOT NULL,
  create_time INTEGER NOT NULL,
  update_time INTEGER NOT NULL,
  ttl_micros INTEGER NOT NULL,
  finalize_time INTEGER NOT NULL,
  tokens INTEGER NOT NULL,
  held_out_tokens INTEGER NOT NULL,
  sums_blob TEXT NOT NULL,
  sums_bytes INTEGER NOT NULL,
  sums_sha256 TEXT NOT NULL,
  checksum INTEGER NOT NULL
) STRICT, WITHOUT ROWID;

CREATE TABLE calibration_labels (
  calibration_id TEXT NOT NULL REFERENCES calibrations ON DELETE CASCADE,
  position INTEGER NOT NULL,
  label TEXT NOT NULL,
  PRIMARY KEY (calibration_id, position)
) STRICT, WITHOUT ROWID;

CREATE TABLE calibration_streams (
  calibration_id TEXT NOT NULL REFERENCES calibrations ON DELETE CASCADE,
  position INTEGER NOT NULL,
  id TEXT NOT NULL,
  sequence INTEGER NOT NULL,
  tokens INTEGER NOT NULL,
  imported INTEGER NOT NULL,
  PRIMARY KEY (calibration_id, position)
) STRICT, WITHOUT ROWID;

CREATE TABLE jobs (
  id TEXT PRIMARY KEY,
  tenant TEXT NOT NULL,
  request_id TEXT NOT NULL,
  request_digest TEXT NOT NULL,
  number INTEGER NOT NULL,
  layer_name TEXT NOT NULL,
  calibration_id TEXT NOT NULL,
  spec BLOB NOT NULL,
  rows INTEGER NOT NULL,
  features INTEGER NOT NULL,
  weight_dtype INTEGER NOT NULL,
  weights_sha256 TEXT NOT NULL,
  weights_blob TEXT NOT NULL,
  weights_bytes INTEGER NOT NULL,
  priority INTEGER NOT NULL,
  create_time INTEGER NOT NULL,
  start_time INTEGER NOT NULL,
  end_time INTEGER NOT NULL,
  deadline_time INTEGER NOT NULL,
  ttl_micros INTEGER NOT NULL,
  state INTEGER NOT NULL,
  starts INTEGER NOT NULL,
  error BLOB NOT NULL,
  result_blob TEXT NOT NULL,
  result_bytes INTEGER NOT NULL,
  result_tensor_bytes INTEGER NOT NULL,
  result_header BLOB NOT NULL,
  relative_error REAL,
  lambda_used REAL,
  checksum INTEGER NOT NULL
) STRICT, WITHOUT ROWID;
)sql";

inline constexpr char kSelectCalibrations[] = R"sql(
SELECT id, tenant, request_id, request_digest, features, mismatched, held_out_fraction,
  held_out_block_rows, create_time, update_time, ttl_micros, finalize_time, tokens,
  held_out_tokens, sums_blob, sums_bytes, sums_sha256, checksum
FROM calibrations ORDER BY id
)sql";
inline constexpr char kInsertCalibration[] = R"sql(
INSERT INTO calibrations (id, tenant, request_id, request_digest, features, mismatched,
  held_out_fraction, held_out_block_rows, create_time, update_time, ttl_micros, finalize_time,
  tokens, held_out_tokens, sums_blob, sums_bytes, sums_sha256, checksum)
VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)
)sql";
// Its labels and streams go with it.
inline constexpr char kDeleteCalibration[] = "DELETE FROM calibrations WHERE id = ?";

inline constexpr char kSelectLabels[] =
    "SELECT label FROM calibration_labels WHERE calibration_id = ? ORDER BY position";
inline constexpr char kInsertLabel[] =
    "INSERT INTO calibration_labels (calibration_id, position, label) VALUES (?, ?, ?)";

inline constexpr char kSelectStreams[] = R"sql(
SELECT id, sequence, tokens, imported
FROM calibration_streams WHERE calibration_id = ? ORDER BY position
)sql";
inline constexpr char kInsertStream[] = R"sql(
INSERT INTO calibration_streams (calibration_id, position, id, sequence, tokens, imported)
VALUES (?, ?, ?, ?, ?, ?)
)sql";

inline constexpr char kSelectJobs[] = R"sql(
SELECT id, tenant, request_id, request_digest, number, layer_name, calibration_id, spec, rows,
  features, weight_dtype, weights_sha256, weights_blob, weights_bytes, priority, create_time,
  start_time, end_time, deadline_time, ttl_micros, state, starts, error, result_blob,
  result_bytes, result_tensor_bytes, result_header, relative_error, lambda_used, checksum
FROM jobs ORDER BY number
)sql";
inline constexpr char kInsertJob[] = R"sql(
INSERT INTO jobs (id, tenant, request_id, request_digest, number, layer_name, calibration_id,
  spec, rows, features, weight_dtype, weights_sha256, weights_blob, weights_bytes, priority,
  create_time, start_time, end_time, deadline_time, ttl_micros, state, starts, error,
  result_blob, result_bytes, result_tensor_bytes, result_header, relative_error, lambda_used,
  checksum)
VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)
)sql";
inline constexpr char kDeleteJob[] = "DELETE FROM jobs WHERE id = ?";

}  // namespace certiq::server

#endif  // CERTIQ_STORE_SCHEMA_H_
