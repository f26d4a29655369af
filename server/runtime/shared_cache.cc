#include "runtime/shared_cache.h"

#include "absl/cleanup/cleanup.h"
#include "base/status_macros.h"

namespace certiq::server {

absl::StatusOr<SharedCache::Found> SharedCache::Get(
    const std::string& key, int64_t bytes, const std::function<absl::StatusOr<Value>()>& make) {
  for (;;) {
    std::shared_ptr<Flight> flight;
    bool ours = false;
    {
      const base::MutexLock lock(mu_);
      if (const auto found = entries_.find(key); found != entries_.end()) {
        by_use_.splice(by_use_.end(), by_use_, found->second.used);
        const std::shared_ptr<Held>& held = found->second.held;
        return Found{Value(held, held->value.get()), true};
      }
      std::shared_ptr<Flight>& slot = flights_[key];
      ours = slot == nullptr;
      if (ours) slot = std::make_shared<Flight>();
      flight = slot;
    }
    if (!ours) {
      pool_.HelpUntil(flight->done);
      if (flight->value != nullptr) return Found{flight->value, true};
      continue;
    }
    // Runs even if `make` throws, so that no thread waits for ever.
    const absl::Cleanup land = [&] {
      {
        const base::MutexLock lock(mu_);
        flights_.erase(key);
      }
      flight->done = true;
      pool_.WakeHelpers();
    };
    ASSIGN_OR_RETURN(Value made, make());
    flight->value = Keep(key, bytes, std::move(made));
    return Found{flight->value, false};
  }
}

SharedCache::Value SharedCache::Keep(const std::string& key, int64_t bytes, Value value) {
  std::list<std::shared_ptr<Held>> dropped;
  {
    const base::MutexLock lock(mu_);
    DropUnused(capacity_ - bytes, dropped);
    if (bytes_ + bytes > capacity_) return value;
    // Counted before the budget is asked, so that other threads see these bytes as taken.
    bytes_ += bytes;
  }
  dropped.clear();
  absl::StatusOr<ByteBudget::Reservation> reservation =
      budget_.TryReserve(bytes, "a factor to keep");
  if (!reservation.ok()) {
    const base::MutexLock lock(mu_);
    bytes_ -= bytes;
    return value;
  }
  const auto held = std::make_shared<Held>(Held{*std::move(reservation), std::move(value)});
  const base::MutexLock lock(mu_);
  const auto used = by_use_.insert(by_use_.end(), key);
  entries_[key] = {held, used};
  return Value(held, held->value.get());
}

void SharedCache::DropUnused(int64_t limit, std::list<std::shared_ptr<Held>>& dropped) {
  for (auto at = by_use_.begin(); at != by_use_.end() && bytes_ > limit;) {
    const auto entry = entries_.find(*at);
    // Dropping a value in use frees nothing.
    if (entry->second.held.use_count() > 1) {
      ++at;
      continue;
    }
    bytes_ -= entry->second.held->reservation.bytes();
    dropped.push_back(std::move(entry->second.held));
    entries_.erase(entry);
    at = by_use_.erase(at);
  }
}

void SharedCache::Reclaim(int64_t bytes) {
  std::list<std::shared_ptr<Held>> dropped;
  const base::MutexLock lock(mu_);
  DropUnused(bytes_ - bytes, dropped);
}

void SharedCache::Drop(const std::string& prefix) {
  std::list<std::shared_ptr<Held>> dropped;
  const base::MutexLock lock(mu_);
  for (auto at = entries_.lower_bound(prefix);
       at != entries_.end() && at->first.compare(0, prefix.size(), prefix) == 0;) {
    bytes_ -= at->second.held->reservation.bytes();
    dropped.push_back(std::move(at->second.held));
    by_use_.erase(at->second.used);
    at = entries_.erase(at);
  }
}

}  // namespace certiq::server
