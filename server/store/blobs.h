// The blob store: immutable bytes under random names.

#ifndef CERTIQ_STORE_BLOBS_H_
#define CERTIQ_STORE_BLOBS_H_

#include <cstddef>
#include <cstdint>
#include <memory>
#include <set>
#include <span>
#include <string>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "store/records.h"

namespace certiq::server {

// Bytes on their way into the store. What was not committed vanishes with the writer. Not
// thread-safe.
class BlobWriter {
 public:
  virtual ~BlobWriter() = default;
  virtual absl::Status Append(std::span<const std::byte> bytes) = 0;
  // Makes the bytes durable under a name of the store's choosing. Until a record names the blob,
  // RemoveAllBut removes it.
  virtual absl::StatusOr<BlobRef> Commit() = 0;
};

// Thread-safe. It stays usable when the blob is removed meanwhile.
class BlobReader {
 public:
  virtual ~BlobReader() = default;
  virtual int64_t bytes() const = 0;
  // Fills `to` from `offset`; every byte is checked. DATA_LOSS, with the file's name, where what
  // is stored is not what was written. REQUIRES: 0 <= offset, offset + to.size() <= bytes().
  virtual absl::Status Read(int64_t offset, std::span<std::byte> to) const = 0;
};

// Thread-safe. Errors are those of Catalog (catalog.h).
class Blobs {
 public:
  virtual ~Blobs() = default;

  virtual absl::StatusOr<std::unique_ptr<BlobWriter>> Create() = 0;
  // DATA_LOSS where there is no such blob: a record promised it.
  virtual absl::StatusOr<std::unique_ptr<BlobReader>> Open(const BlobRef& blob) = 0;
  // RESOURCE_EXHAUSTED where a blob of so many bytes would find no room as things are. A hint: who
  // writes one may find that others were faster.
  virtual absl::Status HasRoom(int64_t /*bytes*/) { return absl::OkStatus(); }
  // Removes a blob that no record names any more. A failure is no error: the next start tries
  // again.
  virtual void Remove(const BlobRef& blob) = 0;
  // Removes every blob but those of these names, and what was left unfinished. Once, at the start.
  virtual absl::Status RemoveAllBut(const std::set<std::string>& names) = 0;
};

}  // namespace certiq::server

#endif  // CERTIQ_STORE_BLOBS_H_
