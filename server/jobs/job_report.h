// What an observer hears of a job that ended, however it was started.

#ifndef CERTIQ_JOBS_JOB_REPORT_H_
#define CERTIQ_JOBS_JOB_REPORT_H_

#include "absl/status/status.h"
#include "engine/certificate.h"
#include "engine/spec.h"
#include "jobs/job_state.h"
#include "jobs/observer.h"

namespace certiq::jobs {

// The final state that a status stands for.
JobState OutcomeOf(absl::StatusCode code);

// Phases, stability failures, outcome. `seconds` from when it was queued to its end; `certificate`
// is null unless the status is OK.
void ReportFinished(const engine::ResolvedSpec& spec, const absl::Status& status, double seconds,
                    const engine::LayerCertificate* certificate, Observer& observer);

}  // namespace certiq::jobs

#endif  // CERTIQ_JOBS_JOB_REPORT_H_
