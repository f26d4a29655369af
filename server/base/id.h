// Random resource ids.

#ifndef CERTIQ_BASE_ID_H_
#define CERTIQ_BASE_ID_H_

#include <string>

#include "absl/strings/string_view.h"

namespace certiq::base {

// `prefix` and 128 random bits in hex: "job-3f2a...". The bits come from the kernel, so that no
// client can guess the id of another's resource.
std::string NewId(absl::string_view prefix);

}  // namespace certiq::base

#endif  // CERTIQ_BASE_ID_H_
