// The disk reserve: a file that is given up where a deletion finds the disk full.

#ifndef CERTIQ_STORE_RESERVE_H_
#define CERTIQ_STORE_RESERVE_H_

#include <memory>
#include <utility>

#include "absl/base/thread_annotations.h"
#include "absl/status/status.h"
#include "base/mutex.h"
#include "store/disk.h"

namespace certiq::server {

inline constexpr char kReserveName[] = "reserve";

// Deleting a record writes some pages before anything is freed, and so does cancelling or ending a
// job. Where the disk has no room for them, this file gives its own up. Thread-safe.
class DiskReserve {
 public:
  explicit DiskReserve(std::shared_ptr<Disk> disk) : disk_(std::move(disk)) {}

  // Takes the space where it is not held. A full disk is no error: what is there can be read.
  absl::Status Fill();
  bool held() const {
    const base::MutexLock lock(mu_);
    return held_;
  }
  // Gives the space up; an error where there was none.
  absl::Status Spend();

 private:
  const std::shared_ptr<Disk> disk_;
  mutable base::Mutex mu_;
  bool held_ ABSL_GUARDED_BY(mu_) = false;
};

}  // namespace certiq::server

#endif  // CERTIQ_STORE_RESERVE_H_
