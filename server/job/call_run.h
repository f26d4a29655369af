// The run of a job that no store keeps: a Quantize call's.

#ifndef CERTIQ_JOB_CALL_RUN_H_
#define CERTIQ_JOB_CALL_RUN_H_

#include <functional>
#include <memory>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "calibration/calibration_desk.h"
#include "calibration/environment.h"
#include "job/result.h"
#include "job/run.h"
#include "job/upload.h"
#include "runtime/byte_budget.h"

namespace certiq::server {

// The result of such a run, and what pays for it.
struct CallResult {
  ByteBudget::Reservation memory;
  std::unique_ptr<ResultReader> reader;
};

// Called from any worker, one call at a time; `done` once, when the run holds nothing any more.
struct CallRunCallbacks {
  std::function<void(engine::Phase, double)> progress;
  std::function<void(absl::StatusOr<CallResult>)> done;
};

// Takes a finished upload over and queues its layer. The run may be over before this returns.
// `started` is told of the run before it is queued, for those who may want to cancel it.
void StartCallRun(const Environment& environment, CalibrationDesk& calibrations, Upload& upload,
                  CallRunCallbacks callbacks,
                  const std::function<void(const std::shared_ptr<Run>&)>& started);

}  // namespace certiq::server

#endif  // CERTIQ_JOB_CALL_RUN_H_
