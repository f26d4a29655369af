// What jobs/ tells whoever watches it; metrics/ turns it into numbers.

#ifndef CERTIQ_OBSERVABILITY_OBSERVER_H_
#define CERTIQ_OBSERVABILITY_OBSERVER_H_

#include <cstdint>

#include "engine/certificate.h"
#include "engine/run_context.h"
#include "engine/spec.h"
#include "job/job_state.h"

namespace certiq::server {

// Why a layer, a job, a calibration or a stream was not taken on. kQuota: the tenant has as many as
// it may have.
enum class Rejection { kInvalid, kNotOffered, kQueueFull, kOverBudget, kQuota, kDraining };

// Does nothing by default. Thread-safe: events come from any thread, some
// with a lock of the sender held, so a handler neither blocks nor calls back.
class Observer {
 public:
  virtual ~Observer() = default;

  // A job enters a state, and leaves it for another or because it is
  // forgotten.
  virtual void JobEntered(JobState /*state*/) {}
  virtual void JobLeft(JobState /*state*/) {}
  // A job reached `outcome`, a final state, so many seconds after it was queued. `certificate` is
  // null unless it succeeded; valid during the call only.
  virtual void JobFinished(engine::Method /*method*/, JobState /*outcome*/, double /*seconds*/,
                           const engine::LayerCertificate* /*certificate*/) {}
  // Wall clock that a job spent in a phase.
  virtual void PhaseTook(engine::Method /*method*/, engine::Phase /*phase*/, double /*seconds*/) {}
  // A damping attempt was not accepted; told whether or not the job succeeded
  // in the end.
  virtual void StabilityFailed(engine::Method /*method*/, engine::StabilityCause /*cause*/) {}
  // `rows` tokens of `features` values, `bytes` as sent, went into sums.
  virtual void ActivationsFolded(int64_t /*rows*/, int64_t /*features*/, int64_t /*bytes*/) {}
  virtual void Rejected(Rejection /*reason*/) {}
  // A job asked for a factor of a calibration; `shared`: another job had made it.
  virtual void FactorAsked(bool /*shared*/) {}

  // Levels; each call replaces the last.
  virtual void BudgetChanged(int64_t /*reserved_bytes*/, int64_t /*capacity_bytes*/) {}
  virtual void QueueChanged(int64_t /*depth*/, int64_t /*limit*/) {}
  virtual void WorkersChanged(int64_t /*busy*/, int64_t /*workers*/) {}
};

// For those who do not watch.
inline Observer& IgnoreEvents() {
  static Observer observer;
  return observer;
}

}  // namespace certiq::server

#endif  // CERTIQ_OBSERVABILITY_OBSERVER_H_
