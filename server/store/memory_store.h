// The store of a server without a data directory.

#ifndef CERTIQ_STORE_MEMORY_STORE_H_
#define CERTIQ_STORE_MEMORY_STORE_H_

#include <memory>

#include "store/store.h"

namespace certiq::server {

// Holds everything in memory; durable() is false.
std::unique_ptr<Store> NewMemoryStore();

}  // namespace certiq::server

#endif  // CERTIQ_STORE_MEMORY_STORE_H_
