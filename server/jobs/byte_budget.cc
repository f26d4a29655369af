#include "jobs/byte_budget.h"

#include <algorithm>
#include <utility>

#include "absl/strings/str_cat.h"
#include "jobs/status_details.h"

namespace certiq::jobs {

ByteBudget::Reservation::Reservation(Reservation&& other) noexcept
    : budget_(std::exchange(other.budget_, nullptr)), bytes_(std::exchange(other.bytes_, 0)) {}

ByteBudget::Reservation& ByteBudget::Reservation::operator=(Reservation&& other) noexcept {
  if (this != &other) {
    Release();
    budget_ = std::exchange(other.budget_, nullptr);
    bytes_ = std::exchange(other.bytes_, 0);
  }
  return *this;
}

absl::Status ByteBudget::Reservation::Resize(int64_t bytes, absl::string_view what) {
  if (bytes > bytes_) {
    if (absl::Status taken = budget_->Take(bytes - bytes_, bytes, what); !taken.ok()) return taken;
    bytes_ = bytes;
  } else {
    ShrinkTo(bytes);
  }
  return absl::OkStatus();
}

void ByteBudget::Reservation::ShrinkTo(int64_t bytes) {
  if (bytes >= bytes_) return;
  budget_->Give(bytes_ - bytes);
  bytes_ = bytes;
}

void ByteBudget::Reservation::Release() {
  ShrinkTo(0);
  budget_ = nullptr;
}

ByteBudget::ByteBudget(int64_t capacity, Observer& observer)
    : capacity_(std::max<int64_t>(capacity, 0)), observer_(observer) {
  observer_.BudgetChanged(0, capacity_);
}

absl::StatusOr<ByteBudget::Reservation> ByteBudget::TryReserve(int64_t bytes,
                                                               absl::string_view what) {
  if (absl::Status taken = Take(bytes, bytes, what); !taken.ok()) return taken;
  return Reservation(this, bytes);
}

int64_t ByteBudget::reserved() const {
  const std::lock_guard lock(mu_);
  return reserved_;
}

absl::Status ByteBudget::Take(int64_t more, int64_t total, absl::string_view what) {
  const std::lock_guard lock(mu_);
  // reserved_ never passes capacity_, so the difference does not overflow.
  const int64_t free = capacity_ - reserved_;
  if (more <= free) {
    reserved_ += more;
    observer_.BudgetChanged(reserved_, capacity_);
    return absl::OkStatus();
  }
  const bool never = total > capacity_;
  absl::Status status = absl::ResourceExhaustedError(absl::StrCat(
      what, " needs ", more, " bytes; ", free, " of the budget of ", capacity_, " bytes are free",
      never ? ". It cannot fit this server's budget, however long you wait" : ""));
  SetRetryAfter(status, never ? kRetryLate : kRetrySoon);
  return status;
}

void ByteBudget::Give(int64_t bytes) {
  const std::lock_guard lock(mu_);
  reserved_ -= bytes;
  observer_.BudgetChanged(reserved_, capacity_);
}

}  // namespace certiq::jobs
