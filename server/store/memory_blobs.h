// The blob store of a server without a data directory.

#ifndef CERTIQ_STORE_MEMORY_BLOBS_H_
#define CERTIQ_STORE_MEMORY_BLOBS_H_

#include <memory>

#include "store/blobs.h"

namespace certiq::server {

// Holds everything in memory, under numbers for names.
std::unique_ptr<Blobs> MakeMemoryBlobs();

}  // namespace certiq::server

#endif  // CERTIQ_STORE_MEMORY_BLOBS_H_
