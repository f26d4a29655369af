// Records as rows: every field in the order of its column, once for writing, reading and checking.

#ifndef CERTIQ_STORE_RECORDS_H_
#define CERTIQ_STORE_RECORDS_H_

#include <cstdint>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "store/sqlite.h"
#include "store/store.h"

namespace certiq::server {

// REQUIRES of both inserts: a transaction is open, and there is no row of this id.
absl::Status InsertCalibration(SqlDatabase& database, const CalibrationRecord& record);
absl::Status InsertJob(SqlDatabase& database, const JobRecord& record);

// Every row, checked. DATA_LOSS where one is not what was inserted.
absl::StatusOr<StoredState> SelectAll(SqlDatabase& database);

}  // namespace certiq::server

#endif  // CERTIQ_STORE_RECORDS_H_
