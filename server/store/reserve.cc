#include "store/reserve.h"

#include <cstdint>

#include "absl/status/statusor.h"
#include "base/status_macros.h"

namespace certiq::server {
namespace {

constexpr int64_t kBytes = int64_t{1} << 20;

}  // namespace

absl::Status DiskReserve::Fill() {
  const base::MutexLock lock(mu_);
  if (held_) return absl::OkStatus();
  const absl::StatusOr<DiskFile> file = disk_->OpenOrCreate(kReserveName);
  absl::Status status = file.ok() ? disk_->Allocate(*file, kBytes) : file.status();
  held_ = status.ok();
  if (!absl::IsResourceExhausted(status)) return status;
  // What a full disk had left is not kept from others.
  disk_->Remove(kReserveName).IgnoreError();
  return absl::OkStatus();
}

absl::Status DiskReserve::Spend() {
  const base::MutexLock lock(mu_);
  RETURN_IF_ERROR(disk_->Remove(kReserveName));
  held_ = false;
  return absl::OkStatus();
}

}  // namespace certiq::server
