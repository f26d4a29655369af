// The tables of state.db.

#ifndef CERTIQ_STORE_SCHEMA_H_
#define CERTIQ_STORE_SCHEMA_H_

#include <cstdint>

namespace certiq::server {

// In PRAGMA user_version. A change of the tables raises it and brings the older ones along
// (upgrade.h).
inline constexpr int64_t kSchemaVersion = 2;

// In PRAGMA application_id, "crtq": a database of this program's. Schema 1 had none.
inline constexpr int64_t kApplicationId = 0x63727471;
static_assert(kApplicationId == 1668445297);

// A record is its `body`, the message of stored.proto; every other column but `version` (writes so
// far) and `checksum` (of the body) repeats a field of it for queries. Index names say what asks.
inline constexpr char kCreateTables[] = R"sql(
CREATE TABLE calibrations (
  id TEXT NOT NULL UNIQUE,
  tenant TEXT NOT NULL,
  version INTEGER NOT NULL,
  request_id TEXT NOT NULL,
  create_time INTEGER NOT NULL,
  expire_time INTEGER NOT NULL,
  checksum INTEGER NOT NULL,
  body BLOB NOT NULL
) STRICT;
CREATE UNIQUE INDEX calibrations_request ON calibrations (tenant, request_id)
  WHERE request_id <> '';
CREATE INDEX calibrations_list ON calibrations (tenant, create_time DESC, id DESC);
CREATE INDEX calibrations_expiry ON calibrations (expire_time);

CREATE TABLE calibration_labels (
  calibration_id TEXT NOT NULL REFERENCES calibrations (id) ON DELETE CASCADE,
  label TEXT NOT NULL,
  PRIMARY KEY (calibration_id, label)
) STRICT, WITHOUT ROWID;

CREATE TABLE jobs (
  number INTEGER PRIMARY KEY,
  id TEXT NOT NULL UNIQUE,
  tenant TEXT NOT NULL,
  version INTEGER NOT NULL,
  request_id TEXT NOT NULL,
  calibration_id TEXT NOT NULL,
  state INTEGER NOT NULL,
  priority INTEGER NOT NULL,
  owner TEXT NOT NULL,
  create_time INTEGER NOT NULL,
  deadline_time INTEGER NOT NULL,
  expire_time INTEGER NOT NULL,
  checksum INTEGER NOT NULL,
  body BLOB NOT NULL
) STRICT;
CREATE UNIQUE INDEX jobs_request ON jobs (tenant, request_id) WHERE request_id <> '';
CREATE INDEX jobs_list ON jobs (tenant, create_time DESC, id DESC);
CREATE INDEX jobs_queue ON jobs (priority DESC, number) WHERE state = 1;
CREATE INDEX jobs_owner ON jobs (owner) WHERE owner <> '';
CREATE INDEX jobs_calibration ON jobs (calibration_id) WHERE state < 3;
CREATE INDEX jobs_deadline ON jobs (deadline_time) WHERE state < 3 AND deadline_time > 0;
CREATE INDEX jobs_expiry ON jobs (expire_time) WHERE state >= 3;
)sql";

// Every change of a record changes the one row of `commits` in the same transaction (commits.h):
// `digest` is the exclusive or of all checksums, which SQL has no operator for. `negative` shows a
// number that was damaged.
inline constexpr char kCreateCommits[] = R"sql(
PRAGMA application_id = 1668445297;
CREATE TABLE commits (
  id INTEGER PRIMARY KEY CHECK (id = 1),
  lineage TEXT NOT NULL,
  number INTEGER NOT NULL,
  negative INTEGER NOT NULL CHECK (negative = -number),
  digest INTEGER NOT NULL
) STRICT;
CREATE TRIGGER calibrations_added AFTER INSERT ON calibrations BEGIN
  UPDATE commits SET number = number + 1, negative = negative - 1,
    digest = (digest | new.checksum) - (digest & new.checksum);
END;
CREATE TRIGGER calibrations_removed AFTER DELETE ON calibrations BEGIN
  UPDATE commits SET number = number + 1, negative = negative - 1,
    digest = (digest | old.checksum) - (digest & old.checksum);
END;
CREATE TRIGGER calibrations_changed AFTER UPDATE ON calibrations BEGIN
  UPDATE commits SET digest = (digest | old.checksum) - (digest & old.checksum);
  UPDATE commits SET number = number + 1, negative = negative - 1,
    digest = (digest | new.checksum) - (digest & new.checksum);
END;
CREATE TRIGGER jobs_added AFTER INSERT ON jobs BEGIN
  UPDATE commits SET number = number + 1, negative = negative - 1,
    digest = (digest | new.checksum) - (digest & new.checksum);
END;
CREATE TRIGGER jobs_removed AFTER DELETE ON jobs BEGIN
  UPDATE commits SET number = number + 1, negative = negative - 1,
    digest = (digest | old.checksum) - (digest & old.checksum);
END;
CREATE TRIGGER jobs_changed AFTER UPDATE ON jobs BEGIN
  UPDATE commits SET digest = (digest | old.checksum) - (digest & old.checksum);
  UPDATE commits SET number = number + 1, negative = negative - 1,
    digest = (digest | new.checksum) - (digest & new.checksum);
END;
)sql";

}  // namespace certiq::server

#endif  // CERTIQ_STORE_SCHEMA_H_
