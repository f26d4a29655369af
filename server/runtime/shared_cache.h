// Single-flight LRU cache of values that jobs share.

#ifndef CERTIQ_RUNTIME_SHARED_CACHE_H_
#define CERTIQ_RUNTIME_SHARED_CACHE_H_

#include <atomic>
#include <cstdint>
#include <functional>
#include <list>
#include <map>
#include <memory>
#include <string>
#include <utility>

#include "absl/status/statusor.h"
#include "base/mutex.h"
#include "runtime/byte_budget.h"
#include "runtime/worker_pool.h"

namespace certiq::server {

// Keeps sums and factors of finalized calibrations: at most `capacity` bytes, which are reserved
// from the budget; the least recently used value is dropped first. Of several threads that ask for
// one key at a time, one makes the value (single flight) and the others help with the pool's loops
// meanwhile. Thread-safe.
class SharedCache {
 public:
  using Value = std::shared_ptr<const void>;
  struct Found {
    Value value;
    // True if another call made the value.
    bool shared = false;
  };

  // The pool and the budget outlive it.
  SharedCache(WorkerPool& pool, ByteBudget& budget, int64_t capacity)
      : pool_(pool), budget_(budget), capacity_(capacity) {}

  // The value that is kept for the key, or else the one that `make` returns, of about `bytes`
  // bytes. A value that does not fit is returned but not kept. An error of `make` goes to the
  // caller whose `make` it was; the others call theirs.
  absl::StatusOr<Found> Get(const std::string& key, int64_t bytes,
                            const std::function<absl::StatusOr<Value>()>& make)
      ABSL_LOCKS_EXCLUDED(mu_);

  // Drops unused values until `bytes` are given back to the budget, or none is left.
  void Reclaim(int64_t bytes) ABSL_LOCKS_EXCLUDED(mu_);
  // Drops every key that begins with `prefix`.
  void Drop(const std::string& prefix) ABSL_LOCKS_EXCLUDED(mu_);

 private:
  // A value that a call is making.
  struct Flight {
    std::atomic<bool> done{false};
    // Set before `done`; null if making it failed.
    Value value;
  };
  // The reservation lives as long as the value: until the last user of the value is gone.
  struct Held {
    ByteBudget::Reservation reservation;
    Value value;
  };
  struct Entry {
    std::shared_ptr<Held> held;
    std::list<std::string>::iterator used;
  };

  Value Keep(const std::string& key, int64_t bytes, Value value) ABSL_LOCKS_EXCLUDED(mu_);
  // Drops unused values, the oldest first, until at most `limit` bytes are kept. They go to
  // `dropped`, to be freed without the lock.
  void DropUnused(int64_t limit, std::list<std::shared_ptr<Held>>& dropped)
      ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);

  WorkerPool& pool_;
  ByteBudget& budget_;
  const int64_t capacity_;

  base::Mutex mu_;
  std::map<std::string, Entry> entries_ ABSL_GUARDED_BY(mu_);
  // Keys of entries_, the least recently used first.
  std::list<std::string> by_use_ ABSL_GUARDED_BY(mu_);
  std::map<std::string, std::shared_ptr<Flight>> flights_ ABSL_GUARDED_BY(mu_);
  // Bytes of entries_, and of values about to be kept.
  int64_t bytes_ ABSL_GUARDED_BY(mu_) = 0;
};

}  // namespace certiq::server

#endif  // CERTIQ_RUNTIME_SHARED_CACHE_H_
