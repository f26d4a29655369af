// The states of a job: the contract's are the stored ones.

#ifndef CERTIQ_CONTRACT_JOB_STATE_H_
#define CERTIQ_CONTRACT_JOB_STATE_H_

#include "certiq/v1/job_service.pb.h"

namespace certiq::server {

using JobState = v1::JobState;

// From SUCCEEDED on states are final and never change.
constexpr bool IsFinal(JobState state) {
  return state != v1::JOB_STATE_QUEUED && state != v1::JOB_STATE_RUNNING;
}

}  // namespace certiq::server

#endif  // CERTIQ_CONTRACT_JOB_STATE_H_
