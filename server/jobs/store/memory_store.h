// The store of a server without a data directory.

#ifndef CERTIQ_JOBS_STORE_MEMORY_STORE_H_
#define CERTIQ_JOBS_STORE_MEMORY_STORE_H_

#include <memory>

#include "jobs/store/store.h"

namespace certiq::jobs {

// Holds everything in memory; durable() is false.
std::unique_ptr<Store> NewMemoryStore();

}  // namespace certiq::jobs

#endif  // CERTIQ_JOBS_STORE_MEMORY_STORE_H_
