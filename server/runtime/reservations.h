// Reservations of bytes by the name of what they pay for.

#ifndef CERTIQ_RUNTIME_RESERVATIONS_H_
#define CERTIQ_RUNTIME_RESERVATIONS_H_

#include <cstdint>
#include <map>
#include <string>
#include <utility>

#include "absl/base/thread_annotations.h"
#include "base/mutex.h"
#include "runtime/byte_budget.h"

namespace certiq::server {

// Holds what a stored thing takes of a budget, as long as the catalog has it. Thread-safe.
class Reservations {
 public:
  // Takes over a reservation; one of the same name is given back.
  void Hold(const std::string& name, ByteBudget::Reservation reservation) {
    const base::MutexLock lock(mu_);
    held_[name] = std::move(reservation);
  }
  void ShrinkTo(const std::string& name, int64_t bytes) {
    const base::MutexLock lock(mu_);
    if (const auto found = held_.find(name); found != held_.end()) found->second.ShrinkTo(bytes);
  }
  void Release(const std::string& name) {
    const base::MutexLock lock(mu_);
    held_.erase(name);
  }

 private:
  base::Mutex mu_;
  std::map<std::string, ByteBudget::Reservation> held_ ABSL_GUARDED_BY(mu_);
};

}  // namespace certiq::server

#endif  // CERTIQ_RUNTIME_RESERVATIONS_H_
