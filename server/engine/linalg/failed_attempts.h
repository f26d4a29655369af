// Causes of failed damping attempts, carried by the status of a layer that failed.

#ifndef CERTIQ_ENGINE_LINALG_FAILED_ATTEMPTS_H_
#define CERTIQ_ENGINE_LINALG_FAILED_ATTEMPTS_H_

#include <vector>

#include "absl/status/status.h"
#include "engine/linalg/stability.h"

namespace certiq::engine {

// Attaches why each damping attempt failed, in order; none of them is kNone.
void AttachFailedAttempts(const std::vector<StabilityCause>& causes, absl::Status& status);

// What was attached; empty where nothing was.
std::vector<StabilityCause> FailedAttemptsOf(const absl::Status& status);

}  // namespace certiq::engine

#endif  // CERTIQ_ENGINE_LINALG_FAILED_ATTEMPTS_H_
