// What several jobs use and one of them makes.

#ifndef CERTIQ_RUNTIME_SHARED_CACHE_H_
#define CERTIQ_RUNTIME_SHARED_CACHE_H_

#include <atomic>
#include <cstdint>
#include <functional>
#include <list>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <utility>

#include "absl/status/statusor.h"
#include "runtime/byte_budget.h"
#include "runtime/worker_pool.h"

namespace certiq::server {

// Keeps sums and factors of finalized calibrations while there is room: at most `capacity` bytes,
// reserved from the budget, the least recently used ones dropped first. A value that is asked for
// by several at once is made by one of them; the others help with the pool's work meanwhile.
// Thread-safe.
class SharedCache {
 public:
  using Value = std::shared_ptr<const void>;
  struct Found {
    Value value;
    // Made by somebody else.
    bool shared = false;
  };

  // The pool and the budget outlive it.
  SharedCache(WorkerPool& pool, ByteBudget& budget, int64_t capacity)
      : pool_(pool), budget_(budget), capacity_(capacity) {}

  // The value of the key: kept, or made by `make`, of about so many bytes. Where it cannot be kept
  // it is the caller's alone. Errors go to the one who made them; whoever waited tries itself.
  absl::StatusOr<Found> Get(const std::string& key, int64_t bytes,
                            const std::function<absl::StatusOr<Value>()>& make);

  // Drops unused values until so many bytes are free again, or none is left.
  void Reclaim(int64_t bytes);
  // Drops every key that begins so.
  void Drop(const std::string& prefix);

 private:
  // A value on its way.
  struct Flight {
    std::atomic<bool> done{false};
    // Set before `done`; null: it failed.
    Value value;
  };
  // What the map's pointer keeps alive besides the value, until the last user is gone.
  struct Held {
    ByteBudget::Reservation reservation;
    Value value;
  };
  struct Entry {
    std::shared_ptr<Held> held;
    std::list<std::string>::iterator used;
  };

  Value Keep(const std::string& key, int64_t bytes, Value value);
  // Needs mu_. Drops unused values, oldest first, while `more` says so. What it drops goes to
  // `dropped`, to be let go without the lock.
  void DropUnused(const std::function<bool()>& more, std::list<std::shared_ptr<Held>>& dropped);

  WorkerPool& pool_;
  ByteBudget& budget_;
  const int64_t capacity_;

  std::mutex mu_;
  // All guarded by mu_.
  std::map<std::string, Entry> entries_;
  std::list<std::string> by_use_;  // the oldest first
  std::map<std::string, std::shared_ptr<Flight>> flights_;
  int64_t bytes_ = 0;
};

}  // namespace certiq::server

#endif  // CERTIQ_RUNTIME_SHARED_CACHE_H_
