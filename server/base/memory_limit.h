// How much memory this process may use.

#ifndef CERTIQ_BASE_MEMORY_LIMIT_H_
#define CERTIQ_BASE_MEMORY_LIMIT_H_

#include <cstdint>

namespace certiq::base {

// The smallest of physical memory and the limits of the control groups that this process is in
// (version 2, or version 1 where that is all there is).
int64_t MemoryLimitBytes();

}  // namespace certiq::base

#endif  // CERTIQ_BASE_MEMORY_LIMIT_H_
