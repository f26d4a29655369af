#include "job/job_report.h"

#include "base/status.h"
#include "engine/linalg/failed_attempts.h"
#include "store/transitions.h"

namespace certiq::server {

void ReportFinished(const engine::ResolvedSpec& spec, const absl::Status& status, double seconds,
                    const engine::LayerCertificate* certificate, Observer& observer) {
  const engine::Method method = spec.method;
  if (certificate != nullptr) {
    const engine::EngineSeconds& phases = certificate->seconds;
    observer.PhaseTook(method, engine::Phase::kFactor, phases.factor);
    observer.PhaseTook(method, engine::Phase::kRound, phases.round);
    observer.PhaseTook(method, engine::Phase::kCertify, phases.certify);
    observer.PhaseTook(method, engine::Phase::kReference, phases.reference);
    observer.PhaseTook(method, engine::Phase::kPack, phases.pack);
    for (const engine::StabilityCause cause : certificate->search_failures) {
      observer.StabilityFailed(method, cause);
    }
    for (const engine::DampingAttempt& attempt : certificate->damping_attempts) {
      if (attempt.cause != engine::StabilityCause::kNone) {
        observer.StabilityFailed(method, attempt.cause);
      }
    }
  } else {
    // Every attempt failed.
    for (const engine::StabilityCause cause : engine::FailedAttemptsOf(status)) {
      observer.StabilityFailed(method, cause);
    }
  }
  observer.JobFinished(method, StateOf(status.code()), seconds, certificate);
}

}  // namespace certiq::server
