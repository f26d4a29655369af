// The states of a job.

#ifndef CERTIQ_JOB_JOB_STATE_H_
#define CERTIQ_JOB_JOB_STATE_H_

namespace certiq::server {

// From kSucceeded on they are final and never change. The numbers are stored.
enum class JobState {
  kQueued = 0,
  kRunning = 1,
  kSucceeded = 2,
  kFailed = 3,
  kCancelled = 4,
  // The deadline passed.
  kExpired = 5,
};

constexpr bool IsFinal(JobState state) {
  return state != JobState::kQueued && state != JobState::kRunning;
}

}  // namespace certiq::server

#endif  // CERTIQ_JOB_JOB_STATE_H_
