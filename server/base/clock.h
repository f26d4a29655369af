// Wall-clock time in the unit that records store.

#ifndef CERTIQ_BASE_CLOCK_H_
#define CERTIQ_BASE_CLOCK_H_

#include <chrono>
#include <cstdint>

namespace certiq::base {

// Microseconds since the Unix epoch. 0 means never, or not yet.
using UnixMicros = int64_t;

inline UnixMicros Now() {
  return std::chrono::duration_cast<std::chrono::microseconds>(
             std::chrono::system_clock::now().time_since_epoch())
      .count();
}

}  // namespace certiq::base

#endif  // CERTIQ_BASE_CLOCK_H_
