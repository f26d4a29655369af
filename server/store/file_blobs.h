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
#include <set>
#include <string>

#include "store/blobs.h"
#include "store/disk.h"
#include "store/reserve.h"

namespace certiq::server {

// Where finished blobs are, and those still being written.
inline constexpr char kBlobDirectory[] = "tensors";
inline constexpr char kIncomingDirectory[] = "incoming";
// Where blobs are that a loss of records left without one.
inline constexpr char kQuarantineDirectory[] = "quarantine";

inline constexpr int64_t kBlobBlockBytes = int64_t{1} << 20;

// Whether a blob may have this name: 128 random bits in hex.
bool IsBlobName(const std::string& name);

// Blobs are written to kIncomingDirectory; Commit moves the file to kBlobDirectory. A Read of a
// reader reads the blocks it touches whole: ranges of whole blocks are the cheapest. The reserve is
// filled again where a removal made room, and before a blob is written: what is left on a full disk
// is for deletions. Files of other names, and what is no file, are left alone. REQUIRES: both
// directories are there.
std::unique_ptr<Blobs> MakeFileBlobs(std::shared_ptr<Disk> disk,
                                     std::shared_ptr<DiskReserve> reserve);

// Moves every blob but those of these names to kQuarantineDirectory, which is made, durably.
absl::Status SetAsideAllBut(Disk& disk, const std::set<std::string>& names);

}  // namespace certiq::server

#endif  // CERTIQ_STORE_FILE_BLOBS_H_
