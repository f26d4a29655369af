// How much memory this process may use.

#ifndef CERTIQ_JOBS_MEMORY_LIMIT_H_
#define CERTIQ_JOBS_MEMORY_LIMIT_H_

#include <cstdint>

namespace certiq::jobs {

// The smallest of physical memory and the limits of the control groups that this process is in
// (version 2, or version 1 where that is all there is).
int64_t MemoryLimitBytes();

}  // namespace certiq::jobs

#endif  // CERTIQ_JOBS_MEMORY_LIMIT_H_
