#include "runtime/byte_budget.h"

#include <algorithm>
#include <utility>

#include "absl/strings/str_cat.h"
#include "base/status.h"
#include "base/status_macros.h"

namespace certiq::server {

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
    RETURN_IF_ERROR(budget_->Take(bytes - bytes_, bytes, what));
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
    : name_("the budget"), observer_(observer), capacity_(std::max<int64_t>(capacity, 0)) {
  observer_.BudgetChanged(0, capacity_);
}

ByteBudget::ByteBudget(int64_t capacity, ByteBudget& whole, std::string name)
    : whole_(&whole),
      name_(std::move(name)),
      observer_(IgnoreEvents()),
      capacity_(std::max<int64_t>(capacity, 0)) {}

absl::StatusOr<ByteBudget::Reservation> ByteBudget::TryReserve(int64_t bytes,
                                                               absl::string_view what) {
  RETURN_IF_ERROR(Take(bytes, bytes, what));
  return Reservation(this, bytes);
}

absl::Status ByteBudget::CheckCanFit(int64_t bytes, absl::string_view what) const {
  for (const ByteBudget* budget = this; budget != nullptr; budget = budget->whole_) {
    if (bytes <= budget->capacity()) continue;
    return absl::ResourceExhaustedError(
        absl::StrCat(what, " needs ", bytes, " bytes, more than ", budget->name_, " of ",
                     budget->capacity(), " bytes. It cannot fit, however long you wait"));
  }
  return absl::OkStatus();
}

bool ByteBudget::HasRoomOfItsOwn(int64_t bytes) const {
  const base::MutexLock lock(mu_);
  return bytes <= capacity_ - reserved_;
}

ByteBudget::Reservation ByteBudget::Reserve(int64_t bytes) {
  for (ByteBudget* budget = this; budget != nullptr; budget = budget->whole_) {
    const base::MutexLock lock(budget->mu_);
    budget->reserved_ += bytes;
    budget->observer_.BudgetChanged(budget->reserved_, budget->capacity_);
  }
  return Reservation(this, bytes);
}

int64_t ByteBudget::capacity() const {
  const base::MutexLock lock(mu_);
  return capacity_;
}

void ByteBudget::SetCapacity(int64_t capacity) {
  const base::MutexLock lock(mu_);
  capacity_ = std::max<int64_t>(capacity, 0);
  observer_.BudgetChanged(reserved_, capacity_);
}

int64_t ByteBudget::reserved() const {
  const base::MutexLock lock(mu_);
  return reserved_;
}

absl::Status ByteBudget::Take(int64_t more, int64_t total, absl::string_view what) {
  absl::Status taken = TakeOnce(more, total, what);
  if (taken.ok() || !reclaim_) return taken;
  reclaim_(more);
  return TakeOnce(more, total, what);
}

absl::Status ByteBudget::TakeOnce(int64_t more, int64_t total, absl::string_view what) {
  {
    const base::MutexLock lock(mu_);
    // Negative if Reserve passed the capacity.
    const int64_t free = capacity_ - reserved_;
    if (more > free) {
      const bool never =
          total > capacity_ || (whole_ != nullptr && !whole_->CheckCanFit(total, what).ok());
      absl::Status status = absl::ResourceExhaustedError(absl::StrCat(
          what, " needs ", more, " bytes; ", std::max<int64_t>(free, 0), " of ", name_, " of ",
          capacity_, " bytes are free", never ? ". It cannot fit, however long you wait" : ""));
      if (!never) base::SetRetryAfter(status, base::kRetrySoon);
      return status;
    }
    reserved_ += more;
    observer_.BudgetChanged(reserved_, capacity_);
  }
  if (whole_ == nullptr) return absl::OkStatus();
  absl::Status taken = whole_->Take(more, total, what);
  if (!taken.ok()) {
    const base::MutexLock lock(mu_);
    reserved_ -= more;
  }
  return taken;
}

void ByteBudget::Give(int64_t bytes) {
  {
    const base::MutexLock lock(mu_);
    reserved_ -= bytes;
    observer_.BudgetChanged(reserved_, capacity_);
  }
  if (whole_ != nullptr) whole_->Give(bytes);
  if (released_) released_();
}

}  // namespace certiq::server
