// The blob store of a data directory: a file a blob.
//
//   header   8 bytes "certiqB1", then the checksum of those
//   block    up to 1 MiB, then the checksum of those
//
// The last block may be shorter. Checksums are 64 bits, little-endian, and depend on the blob's
// name and the block's number: what was swapped or moved is found as well as what was changed, and
// any range can be checked by reading its blocks alone. How long a file must be follows from the
// record that names it.

#ifndef CERTIQ_STORE_FILE_BLOBS_H_
#define CERTIQ_STORE_FILE_BLOBS_H_

#include <cstdint>
#include <memory>
#include <string>

#include "store/blobs.h"
#include "store/disk.h"
#include "store/reserve.h"

namespace certiq::server {

// Where finished blobs are, and those still being written.
inline constexpr char kBlobDirectory[] = "tensors";
inline constexpr char kIncomingDirectory[] = "incoming";

inline constexpr int64_t kBlobBlockBytes = int64_t{1} << 20;

// Whether a blob may have this name: 128 random bits in hex.
bool IsBlobName(const std::string& name);

// Blobs are written to kIncomingDirectory; Commit moves the file to kBlobDirectory. A Read of a
// reader reads the blocks it touches whole: ranges of whole blocks are the cheapest. The reserve is
// filled again where a removal made room. REQUIRES: both directories are there.
std::unique_ptr<Blobs> MakeFileBlobs(std::shared_ptr<Disk> disk,
                                     std::shared_ptr<DiskReserve> reserve);

}  // namespace certiq::server

#endif  // CERTIQ_STORE_FILE_BLOBS_H_
