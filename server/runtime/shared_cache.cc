#include "runtime/shared_cache.h"

#include "absl/cleanup/cleanup.h"

namespace certiq::server {

absl::StatusOr<SharedCache::Found> SharedCache::Get(
    const std::string& key, int64_t bytes, const std::function<absl::StatusOr<Value>()>& make) {
  for (;;) {
    std::shared_ptr<Flight> flight;
    bool ours = false;
    {
      const std::lock_guard lock(mu_);
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
    // Whatever happens, an exception included, those who wait are told.
    const absl::Cleanup land = [&] {
      {
        const std::lock_guard lock(mu_);
        flights_.erase(key);
      }
      flight->done = true;
      pool_.WakeHelpers();
    };
    absl::StatusOr<Value> made = make();
    if (!made.ok()) return made.status();
    flight->value = Keep(key, bytes, *std::move(made));
    return Found{flight->value, false};
  }
}

SharedCache::Value SharedCache::Keep(const std::string& key, int64_t bytes, Value value) {
  std::list<std::shared_ptr<Held>> dropped;
  {
    const std::lock_guard lock(mu_);
    DropUnused([&] { return bytes_ + bytes > capacity_; }, dropped);
    if (bytes_ + bytes > capacity_) return value;
    // Others that come while the budget is asked see that this room is taken.
    bytes_ += bytes;
  }
  dropped.clear();
  absl::StatusOr<ByteBudget::Reservation> reservation =
      budget_.TryReserve(bytes, "a factor to keep");
  if (!reservation.ok()) {
    const std::lock_guard lock(mu_);
    bytes_ -= bytes;
    return value;
  }
  const auto held = std::make_shared<Held>(Held{*std::move(reservation), std::move(value)});
  const std::lock_guard lock(mu_);
  const auto used = by_use_.insert(by_use_.end(), key);
  entries_[key] = {held, used};
  return Value(held, held->value.get());
}

void SharedCache::DropUnused(const std::function<bool()>& more,
                             std::list<std::shared_ptr<Held>>& dropped) {
  for (auto at = by_use_.begin(); at != by_use_.end() && more();) {
    const auto entry = entries_.find(*at);
    // In use: dropping it frees nothing.
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
  const std::lock_guard lock(mu_);
  const int64_t before = bytes_;
  DropUnused([&] { return before - bytes_ < bytes; }, dropped);
}

void SharedCache::Drop(const std::string& prefix) {
  std::list<std::shared_ptr<Held>> dropped;
  const std::lock_guard lock(mu_);
  for (auto at = entries_.lower_bound(prefix);
       at != entries_.end() && at->first.compare(0, prefix.size(), prefix) == 0;) {
    bytes_ -= at->second.held->reservation.bytes();
    dropped.push_back(std::move(at->second.held));
    by_use_.erase(at->second.used);
    at = entries_.erase(at);
  }
}

}  // namespace certiq::server
