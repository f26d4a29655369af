// Upgrades of state.db from older schemas.

#ifndef CERTIQ_STORE_UPGRADE_H_
#define CERTIQ_STORE_UPGRADE_H_

#include <string>

#include "absl/status/status.h"
#include "store/sqlite.h"

namespace certiq::server {

// Tables of schema 1, which had a column for each field, become those of kSchemaVersion; what they
// hold is checked. All of it is one transaction: a failure leaves schema 1. `lineage`: commits.h.
absl::Status UpgradeFromSchema1(SqlDatabase& database, const std::string& lineage);

}  // namespace certiq::server

#endif  // CERTIQ_STORE_UPGRADE_H_
