#include "rpc/services/convert_job.h"

#include "absl/strings/str_cat.h"
#include "base/status.h"
#include "contract/enums.h"
#include "contract/resolve_spec.h"
#include "contract/time.h"

namespace certiq::server {

v1::Job ToProto(const JobView& view) {
  const JobRecord& record = view.record;
  v1::Job to;
  to.set_id(record.id());
  to.set_state(record.state());
  to.set_request_id(record.request_id());
  to.set_layer_name(record.layer_name());
  to.set_calibration_id(record.calibration_id());
  *to.mutable_spec() = record.spec();
  if (to.spec().has_grid()) {
    // Two numbers a group would make an answer larger than clients take.
    to.mutable_spec()->mutable_grid()->clear_scales();
    to.mutable_spec()->mutable_grid()->clear_zero_points();
  }
  to.set_rows(record.rows());
  to.set_features(record.features());
  to.set_priority(record.priority());
  SetTime(record.create_time(), to.mutable_create_time());
  if (record.start_time() != 0) SetTime(record.start_time(), to.mutable_start_time());
  if (record.deadline_time() != 0) SetTime(record.deadline_time(), to.mutable_deadline_time());
  if (record.end_time() != 0) {
    SetTime(record.end_time(), to.mutable_end_time());
    SetTime(ExpireTime(record), to.mutable_expire_time());
  }
  to.set_starts(record.starts());
  if (record.state() == v1::JOB_STATE_RUNNING) {
    to.set_phase(ToWire(view.progress.phase, kPhases));
    to.set_fraction(view.progress.fraction);
  }
  if (view.queue_position >= 0) to.set_queue_position(view.queue_position);
  if (record.has_error()) *to.mutable_error() = record.error();
  to.set_result_bytes(record.result().tensor_bytes());
  to.set_relative_error(record.result().relative_error());
  to.set_lambda_used(record.result().lambda_used());
  return to;
}

absl::StatusOr<JobState> ReadJobState(int state) {
  if (v1::JobState_IsValid(state) && state != v1::JOB_STATE_UNSPECIFIED) {
    return static_cast<JobState>(state);
  }
  std::string expected;
  for (int known = v1::JobState_MIN + 1; known <= v1::JobState_MAX; ++known) {
    absl::StrAppend(&expected, expected.empty() ? "" : ", ",
                    v1::JobState_Name(static_cast<JobState>(known)));
  }
  return base::InvalidField("states", absl::StrCat("expected one of ", expected, "; got ",
                                                   NameOf(static_cast<JobState>(state))));
}

}  // namespace certiq::server
