// The bytes that clients may make this server hold.

#ifndef CERTIQ_RUNTIME_BYTE_BUDGET_H_
#define CERTIQ_RUNTIME_BYTE_BUDGET_H_

#include <cstdint>
#include <functional>
#include <mutex>
#include <string>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "observability/observer.h"

namespace certiq::server {

// Counts promises, not allocations: whoever is about to hold memory (or disk) for a
// client reserves it first. Thread-safe; outlives its reservations.
class ByteBudget {
 public:
  // A share of the budget, given back on destruction. Not thread-safe by
  // itself; different reservations may be used from different threads.
  class Reservation {
   public:
    Reservation() = default;
    Reservation(Reservation&& other) noexcept;
    Reservation& operator=(Reservation&& other) noexcept;
    ~Reservation() { Release(); }

    int64_t bytes() const { return bytes_; }
    // Grows or shrinks to `bytes`; shrinking never fails. On failure nothing
    // changes. REQUIRES: this came from TryReserve, bytes >= 0.
    absl::Status Resize(int64_t bytes, absl::string_view what);
    // Shrinks to `bytes` if it holds more.
    void ShrinkTo(int64_t bytes);
    void Release();

   private:
    friend class ByteBudget;
    Reservation(ByteBudget* budget, int64_t bytes) : budget_(budget), bytes_(bytes) {}

    ByteBudget* budget_ = nullptr;
    int64_t bytes_ = 0;
  };

  explicit ByteBudget(int64_t capacity, Observer& observer = IgnoreEvents());
  // A share of `whole`, which outlives it: what is reserved here is reserved there too. `name`
  // is for messages: "this tenant's quota".
  ByteBudget(int64_t capacity, ByteBudget& whole, std::string name);
  ByteBudget(const ByteBudget&) = delete;
  ByteBudget& operator=(const ByteBudget&) = delete;

  // `what` says for whom ("this layer"). RESOURCE_EXHAUSTED where it does not fit, with a retry
  // delay (status_details.h) if it would fit once others are gone. REQUIRES: bytes >= 0.
  absl::StatusOr<Reservation> TryReserve(int64_t bytes, absl::string_view what);
  // RESOURCE_EXHAUSTED where so much would not fit even if nothing else were there.
  absl::Status CheckCanFit(int64_t bytes, absl::string_view what) const;
  // For what is there already, such as files found at the start: may pass the capacity.
  Reservation Reserve(int64_t bytes);

  // Asked, from any thread that reserves, to give back so many bytes that nobody needs at the
  // moment; the reservation is tried again after it. Set before the first use, called without locks
  // of the budget.
  void SetReclaimer(std::function<void(int64_t)> reclaim) { reclaim_ = std::move(reclaim); }
  // Called when bytes were given back, with locks of the caller held: only wakes somebody.
  void SetReleased(std::function<void()> released) { released_ = std::move(released); }

  int64_t capacity() const;
  void SetCapacity(int64_t capacity);
  int64_t reserved() const;

 private:
  // Adds `more` for a reservation that will then hold `total`.
  absl::Status Take(int64_t more, int64_t total, absl::string_view what);
  absl::Status TakeOnce(int64_t more, int64_t total, absl::string_view what);
  void Give(int64_t bytes);

  ByteBudget* const whole_ = nullptr;
  const std::string name_;
  Observer& observer_;
  std::function<void(int64_t)> reclaim_;
  std::function<void()> released_;
  mutable std::mutex mu_;
  int64_t capacity_;      // guarded by mu_
  int64_t reserved_ = 0;  // guarded by mu_
};

}  // namespace certiq::server

#endif  // CERTIQ_RUNTIME_BYTE_BUDGET_H_
