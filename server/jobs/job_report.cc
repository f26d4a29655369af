#include "jobs/job_report.h"

#include "engine/status.h"

namespace certiq::jobs {

JobState OutcomeOf(absl::StatusCode code) {
  switch (code) {
    case absl::StatusCode::kOk:
      return JobState::kSucceeded;
    case absl::StatusCode::kCancelled:
      return JobState::kCancelled;
    case absl::StatusCode::kDeadlineExceeded:
      return JobState::kExpired;
    default:
      return JobState::kFailed;
  }
}

void ReportFinished(const engine::ResolvedSpec& spec, const absl::Status& status,
                    const engine::LayerCertificate* certificate, Observer& observer) {
  const engine::Method method = spec.method;
  if (certificate != nullptr) {
    const engine::EngineSeconds& seconds = certificate->seconds;
    observer.PhaseTook(method, engine::Phase::kFactor, seconds.factor);
    observer.PhaseTook(method, engine::Phase::kRound, seconds.round);
    observer.PhaseTook(method, engine::Phase::kCertify, seconds.certify);
    observer.PhaseTook(method, engine::Phase::kReference, seconds.reference);
    observer.PhaseTook(method, engine::Phase::kPack, seconds.pack);
    for (const engine::StabilityCause cause : certificate->ladder_failures) {
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
  observer.JobFinished(method, OutcomeOf(status.code()), certificate);
}

}  // namespace certiq::jobs
