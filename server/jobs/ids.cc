#include "jobs/ids.h"

#include <chrono>
#include <cstdint>
#include <random>

#include "absl/strings/str_cat.h"

namespace certiq::jobs {

std::string NewId(absl::string_view prefix) {
  std::random_device random;  // the kernel's
  const auto word = [&random] { return (uint64_t{random()} << 32) | random(); };
  const uint64_t high = word();
  return absl::StrCat(prefix, absl::Hex(high, absl::kZeroPad16),
                      absl::Hex(word(), absl::kZeroPad16));
}

UnixMicros Now() {
  return std::chrono::duration_cast<std::chrono::microseconds>(
             std::chrono::system_clock::now().time_since_epoch())
      .count();
}

}  // namespace certiq::jobs
