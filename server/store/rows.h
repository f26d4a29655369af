// Records as rows: messages to columns and back, checked.

#ifndef CERTIQ_STORE_ROWS_H_
#define CERTIQ_STORE_ROWS_H_

#include <cstdint>
#include <limits>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "absl/functional/function_ref.h"
#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "store/records.h"
#include "store/sqlite.h"

namespace certiq::server {

// REQUIRES of every write: a transaction is open.

// Adds a record, or writes over the one of its id.
absl::Status PutRow(SqlDatabase& database, const CalibrationRecord& record);
absl::Status PutRow(SqlDatabase& database, const JobRecord& record);

// The records of a query; `where` is what follows "FROM <table>", constant SQL; `bind` sets its
// parameters. Reading stops behind the record with which they have more than `max_bytes`.
// DATA_LOSS where a row is not what was written.
template <typename Record>
absl::StatusOr<std::vector<Record>> SelectRows(
    SqlDatabase& database, const char* where, absl::FunctionRef<void(SqlStatement&)> bind,
    int64_t max_bytes = std::numeric_limits<int64_t>::max());

// The first of them, nothing where there is none.
template <typename Record>
absl::StatusOr<std::optional<Record>> SelectRow(SqlDatabase& database, const char* where,
                                                absl::FunctionRef<void(SqlStatement&)> bind) {
  absl::StatusOr<std::vector<Record>> rows = SelectRows<Record>(database, where, bind);
  if (!rows.ok()) return rows.status();
  if (rows->empty()) return std::optional<Record>();
  return std::optional<Record>(std::move(rows->front()));
}

// DATA_LOSS where the labels that queries see are not those of the records. REQUIRES:
// `calibrations` are all there are.
absl::Status CheckLabels(SqlDatabase& database, const std::vector<CalibrationRecord>& calibrations);

// Deletes the record of this id, where it is there.
template <typename Record>
absl::Status DeleteRow(SqlDatabase& database, const std::string& id);

}  // namespace certiq::server

#endif  // CERTIQ_STORE_ROWS_H_
