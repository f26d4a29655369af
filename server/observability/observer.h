// Observer of jobs, the worker pool and the memory budget.

#ifndef CERTIQ_OBSERVABILITY_OBSERVER_H_
#define CERTIQ_OBSERVABILITY_OBSERVER_H_

#include <cstdint>

#include "contract/job_state.h"
#include "engine/certificate.h"
#include "engine/run_context.h"
#include "engine/spec.h"

namespace certiq::server {

// The reason for which a layer, a job, a calibration or a stream was refused.
enum class Rejection {
  kInvalid,
  kNotOffered,
  kQueueFull,
  // Memory or disk space, the server's or the tenant's.
  kOverBudget,
  // The tenant's number of jobs or streams.
  kQuota,
  kDraining,
};

// Receives events; every handler does nothing by default. It keeps the modules that report events
// free of prometheus. Thread-safe: events come from any thread, some with a lock of the sender
// held, so a handler neither blocks nor calls back.
class Observer {
 public:
  virtual ~Observer() = default;

  // A job entered a state; it left a state for another, or because it was deleted.
  virtual void JobEntered(JobState /*state*/) {}
  virtual void JobLeft(JobState /*state*/) {}
  // A job reached `outcome`, a final state, `seconds` after it was queued. `certificate` is null
  // unless it succeeded, and valid during the call only.
  virtual void JobFinished(engine::Method /*method*/, JobState /*outcome*/, double /*seconds*/,
                           const engine::LayerCertificate* /*certificate*/) {}
  // A job spent `seconds` of wall clock in a phase.
  virtual void PhaseTook(engine::Method /*method*/, engine::Phase /*phase*/, double /*seconds*/) {}
  // A damping attempt was not accepted; reported whether or not a later attempt succeeded.
  virtual void StabilityFailed(engine::Method /*method*/, engine::StabilityCause /*cause*/) {}
  // `rows` tokens of `features` values, `bytes` as sent, were folded into sums.
  virtual void ActivationsFolded(int64_t /*rows*/, int64_t /*features*/, int64_t /*bytes*/) {}
  virtual void Rejected(Rejection /*reason*/) {}
  // A job asked for a factor of a calibration. `shared` is true if another job had made it.
  virtual void FactorAsked(bool /*shared*/) {}

  // Gauges: each call replaces the last value.
  virtual void BudgetChanged(int64_t /*reserved_bytes*/, int64_t /*capacity_bytes*/) {}
  virtual void QueueChanged(int64_t /*depth*/, int64_t /*limit*/) {}
  virtual void WorkersChanged(int64_t /*busy*/, int64_t /*workers*/) {}
};

// An observer that ignores every event.
inline Observer& IgnoreEvents() {
  static Observer observer;
  return observer;
}

}  // namespace certiq::server

#endif  // CERTIQ_OBSERVABILITY_OBSERVER_H_
