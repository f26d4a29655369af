// Memory limit of this process: physical memory and control groups.

#ifndef CERTIQ_BASE_MEMORY_LIMIT_H_
#define CERTIQ_BASE_MEMORY_LIMIT_H_

#include <cstdint>

namespace certiq::base {

// The smallest of physical memory and the limits of the control groups that this process is in
// (version 2, or version 1 on machines that have no other).
int64_t MemoryLimitBytes();

}  // namespace certiq::base

#endif  // CERTIQ_BASE_MEMORY_LIMIT_H_
