// The report of a job that ended to the observer, however it was started.

#ifndef CERTIQ_JOB_JOB_REPORT_H_
#define CERTIQ_JOB_JOB_REPORT_H_

#include "absl/status/status.h"
#include "engine/certificate.h"
#include "engine/spec.h"
#include "observability/observer.h"

namespace certiq::server {

// Phases, stability failures, outcome. `seconds` from when it was queued to its end; `certificate`
// is null unless the status is OK.
void ReportFinished(const engine::ResolvedSpec& spec, const absl::Status& status, double seconds,
                    const engine::LayerCertificate* certificate, Observer& observer);

}  // namespace certiq::server

#endif  // CERTIQ_JOB_JOB_REPORT_H_
