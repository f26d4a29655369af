// A blob as a file: a header, then the bytes in blocks of 1 MiB (the last may be shorter), each
// followed by its checksum, so that any range can be checked by reading its blocks alone.
//
//   header   8 bytes "certiqB1", then the checksum of those
//   block    up to 1 MiB, then the checksum of those
//
// Checksums are 64 bits, little-endian, and depend on the blob's name and the block's number: what
// was swapped or moved is found as well as what was changed. How long a file must be follows from
// the record that names it.

#ifndef CERTIQ_STORE_BLOB_FILE_H_
#define CERTIQ_STORE_BLOB_FILE_H_

#include <cstdint>
#include <memory>
#include <string>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "store/disk.h"
#include "store/store.h"

namespace certiq::server {

// Where finished blobs are, and those still being written.
inline constexpr char kBlobDirectory[] = "tensors";
inline constexpr char kIncomingDirectory[] = "incoming";

inline constexpr int64_t kBlobBlockBytes = int64_t{1} << 20;

// Whether a blob may have this name: 128 random bits in hex.
bool IsBlobName(const std::string& name);

// Writes to kIncomingDirectory; Commit moves the file to kBlobDirectory. After an error it can
// only be destroyed, which removes the file.
absl::StatusOr<std::unique_ptr<BlobWriter>> CreateBlobFile(std::shared_ptr<Disk> disk);

// DATA_LOSS where the file is missing, or its length or its header wrong. A Read of the reader
// reads the blocks it touches whole: ranges of whole blocks are the cheapest.
absl::StatusOr<std::unique_ptr<BlobReader>> OpenBlobFile(std::shared_ptr<Disk> disk,
                                                         const BlobRef& blob);

absl::Status RemoveBlobFile(Disk& disk, const std::string& name);

}  // namespace certiq::server

#endif  // CERTIQ_STORE_BLOB_FILE_H_
