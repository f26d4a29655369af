#include "base/id.h"

#include <cstdint>
#include <random>

#include "absl/strings/str_cat.h"

namespace certiq::base {

std::string NewId(absl::string_view prefix) {
  std::random_device random;
  const auto word = [&random] { return (uint64_t{random()} << 32) | random(); };
  const uint64_t high = word();
  return absl::StrCat(prefix, absl::Hex(high, absl::kZeroPad16),
                      absl::Hex(word(), absl::kZeroPad16));
}

}  // namespace certiq::base
