// Byte budget: reservations for what clients make the server hold.

#ifndef CERTIQ_RUNTIME_BYTE_BUDGET_H_
#define CERTIQ_RUNTIME_BYTE_BUDGET_H_

#include <cstdint>
#include <functional>
#include <string>
#include <utility>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "base/mutex.h"
#include "observability/observer.h"

namespace certiq::server {

// Counts promises, not allocations: code that is about to hold memory (or disk space) for a client
// reserves it first. Thread-safe; outlives its reservations.
class ByteBudget {
 public:
  // Bytes of the budget, given back on destruction. Not thread-safe by itself; different
  // reservations may be used from different threads.
  class Reservation {
   public:
    Reservation() = default;
    Reservation(Reservation&& other) noexcept;
    Reservation& operator=(Reservation&& other) noexcept;
    ~Reservation() { Release(); }

    int64_t bytes() const { return bytes_; }
    // Grows or shrinks to `bytes`; shrinking never fails. On failure nothing changes. REQUIRES:
    // this came from TryReserve, bytes >= 0.
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
  // A part of `whole`, which outlives it: bytes that are reserved here are reserved there too.
  // `name` appears in error messages, for example "this tenant's memory".
  ByteBudget(int64_t capacity, ByteBudget& whole, std::string name);
  ByteBudget(const ByteBudget&) = delete;
  ByteBudget& operator=(const ByteBudget&) = delete;

  // RESOURCE_EXHAUSTED if the bytes do not fit, with a retry delay (base/status.h) if they would
  // fit once other reservations are gone. `what` names what needs them ("this layer") in that
  // message. REQUIRES: bytes >= 0.
  absl::StatusOr<Reservation> TryReserve(int64_t bytes, absl::string_view what)
      ABSL_LOCKS_EXCLUDED(mu_);
  // RESOURCE_EXHAUSTED if the bytes would not fit into an empty budget.
  absl::Status CheckCanFit(int64_t bytes, absl::string_view what) const ABSL_LOCKS_EXCLUDED(mu_);
  // Whether the bytes fit into this budget, whatever the whole has left.
  bool HasRoomOfItsOwn(int64_t bytes) const ABSL_LOCKS_EXCLUDED(mu_);
  // May pass the capacity. It is for what exists already, such as files that were found at the
  // start.
  Reservation Reserve(int64_t bytes) ABSL_LOCKS_EXCLUDED(mu_);

  // `reclaim` gives back at least so many bytes of caches if it can; a reservation that did not fit
  // is then tried once more. It runs on the thread that reserves, without the budget's lock. To be
  // set before the first use.
  void SetReclaimer(std::function<void(int64_t)> reclaim) { reclaim_ = std::move(reclaim); }
  // `released` runs after bytes were given back. Its caller may hold locks of its own, so it only
  // wakes another thread. To be set before the first use.
  void SetReleased(std::function<void()> released) { released_ = std::move(released); }

  int64_t capacity() const ABSL_LOCKS_EXCLUDED(mu_);
  void SetCapacity(int64_t capacity) ABSL_LOCKS_EXCLUDED(mu_);
  int64_t reserved() const ABSL_LOCKS_EXCLUDED(mu_);

 private:
  // Reserves `more` bytes for a reservation that will then hold `total`; asks the reclaimer if they
  // do not fit.
  absl::Status Take(int64_t more, int64_t total, absl::string_view what) ABSL_LOCKS_EXCLUDED(mu_);
  absl::Status TakeOnce(int64_t more, int64_t total, absl::string_view what)
      ABSL_LOCKS_EXCLUDED(mu_);
  void Give(int64_t bytes) ABSL_LOCKS_EXCLUDED(mu_);

  ByteBudget* const whole_ = nullptr;
  const std::string name_;
  Observer& observer_;
  std::function<void(int64_t)> reclaim_;
  std::function<void()> released_;
  mutable base::Mutex mu_;
  int64_t capacity_ ABSL_GUARDED_BY(mu_);
  int64_t reserved_ ABSL_GUARDED_BY(mu_) = 0;
};

}  // namespace certiq::server

#endif  // CERTIQ_RUNTIME_BYTE_BUDGET_H_
