// Who loads a result of which settings: the table proto/certiq/v1/readers.csv, asked.

#ifndef CERTIQ_CONTRACT_LOADS_IN_H_
#define CERTIQ_CONTRACT_LOADS_IN_H_

#include <vector>

#include "certiq/v1/certificate.pb.h"
#include "engine/spec.h"

namespace certiq::server {

// The readers of the table that load results of the spec's format, bits, grid, group size and order
// of groups, in the table's order. Empty where none is known to.
std::vector<v1::Reader> LoadsIn(const engine::ResolvedSpec& spec);

}  // namespace certiq::server

#endif  // CERTIQ_CONTRACT_LOADS_IN_H_
