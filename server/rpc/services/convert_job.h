// Jobs as messages.

#ifndef CERTIQ_RPC_SERVICES_CONVERT_JOB_H_
#define CERTIQ_RPC_SERVICES_CONVERT_JOB_H_

#include "absl/status/statusor.h"
#include "certiq/v1/job_service.pb.h"
#include "job/job_desk.h"

namespace certiq::server {

v1::Job ToProto(const JobView& view);

// A state to filter by; INVALID_ARGUMENT about "states" where there is no such state.
absl::StatusOr<JobState> ReadJobState(int state);

}  // namespace certiq::server

#endif  // CERTIQ_RPC_SERVICES_CONVERT_JOB_H_
