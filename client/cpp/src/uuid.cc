#include "certiq/uuid.h"

#include <cstdint>
#include <random>

#include "absl/strings/str_format.h"

namespace certiq {

std::string RandomUuid() {
  std::random_device random;
  const auto next = [&random] { return static_cast<uint64_t>(random()); };
  const uint64_t high = (next() << 32 | next()) & ~uint64_t{0xf000};
  const uint64_t low = (next() << 32 | next()) >> 2;
  // Version 4, variant 10.
  const uint64_t first = high | 0x4000;
  const uint64_t second = low | uint64_t{1} << 63;
  return absl::StrFormat("%08x-%04x-%04x-%04x-%012x", first >> 32, first >> 16 & 0xffff,
                         first & 0xffff, second >> 48, second & 0xffff'ffff'ffff);
}

}  // namespace certiq
