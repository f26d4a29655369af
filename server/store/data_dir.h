// The data directory: whose it is, before anything in it is touched.
//
//   lock                 held while a server runs
//   commits              how many changes state.db has seen (commits.h)
//   state.db             the records; state.db-wal is its log
//   tensors/, incoming/  blobs (file_blobs.h)
//   quarantine/          blobs that a loss of records left without one
//   reserve              given up where the disk is full (reserve.h)
//
// The first three are made in this order, so that a crash during the first start leaves what the
// next one knows.

#ifndef CERTIQ_STORE_DATA_DIR_H_
#define CERTIQ_STORE_DATA_DIR_H_

#include <memory>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "store/disk.h"

namespace certiq::server {

// Makes the directory where it is not there, and takes its lock. FAILED_PRECONDITION, with nothing
// changed, where it is neither empty, but for the lost+found of a file system, nor certiq's: one
// with a state.db or a commits of certiq's, or with no more than an interrupted first start leaves.
// Also where a name of certiq's is a symbolic link or something else than a server makes, and where
// another process has the lock.
absl::StatusOr<std::shared_ptr<const DiskFile>> TakeDataDir(Disk& disk, const char* vfs);

// What is there that no server made, and who else may change what is there; a sentence each.
absl::StatusOr<std::vector<std::string>> WarningsAbout(Disk& disk);

}  // namespace certiq::server

#endif  // CERTIQ_STORE_DATA_DIR_H_
