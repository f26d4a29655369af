// Names that the server makes.

#ifndef CERTIQ_JOBS_IDS_H_
#define CERTIQ_JOBS_IDS_H_

#include <string>

#include "absl/strings/string_view.h"
#include "jobs/store/store.h"

namespace certiq::jobs {

// The prefix and 128 random bits in hex: "job-3f2a...". Nobody guesses another's.
std::string NewId(absl::string_view prefix);

UnixMicros Now();

}  // namespace certiq::jobs

#endif  // CERTIQ_JOBS_IDS_H_
