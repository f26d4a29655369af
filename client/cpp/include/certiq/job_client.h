// Client of the JobService: quantizations that outlive the call that asked for them.
#ifndef CERTIQ_CLIENT_CPP_INCLUDE_CERTIQ_JOB_CLIENT_H_
#define CERTIQ_CLIENT_CPP_INCLUDE_CERTIQ_JOB_CLIENT_H_

#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/time/time.h"
#include "certiq/client.h"
#include "certiq/tensor.h"
#include "certiq/v1/job_service.pb.h"

namespace certiq {

// One layer to quantize. The bytes behind the view must stay until Create returns.
struct JobRequest {
  // At most 128 bytes. The same id and content give the same job. Empty: Create makes one up, so
  // that its own tries make one job.
  std::string request_id = {};
  std::string layer_name = {};
  // Fields left unset take the server's defaults.
  v1::QuantizationSpec spec = {};
  // Weights [R, N] of a floating dtype.
  TensorView weight = {};
  // A finalized calibration of N features.
  std::string calibration_id = {};
  // -100 to 100, higher goes first.
  int32_t priority = 0;
  // The time allowed from the job's creation.
  std::optional<absl::Duration> deadline = {};
  // How long the job and its result are kept after its end.
  std::optional<absl::Duration> ttl = {};
};

struct JobFilter {
  // Empty: all.
  std::vector<v1::JobState> states = {};
  std::string calibration_id = {};
  // Jobs in a message; 0: the server's default. The list is complete either way.
  int32_t page_size = 0;
};

// SUCCEEDED, FAILED, CANCELLED, EXPIRED: states that never change.
bool IsFinal(v1::JobState state);

// Why a job failed, was cancelled or expired; OK for others. Details as of a server's status.
absl::Status JobError(const v1::Job& job);

// Every call blocks. Errors of all of them: the server's status as job_service.proto lists them,
// details readable by DetailsOf(status), UNAVAILABLE where no server could be reached; both come
// back only after the tries that ClientOptions::retry allows. INTERNAL where the server's answer
// breaks the contract; CANCELLED, DEADLINE_EXCEEDED by the options.
// Thread-safe: any number of calls may run at once on one client, which must outlive them.
class JobClient {
 public:
  // Does not connect yet. Errors as Client::Create.
  static absl::StatusOr<std::unique_ptr<JobClient>> Create(ClientOptions options);

  JobClient(const JobClient&) = delete;
  JobClient& operator=(const JobClient&) = delete;
  ~JobClient();

  // Sends a layer and queues it; the job is durable when this returns. INVALID_ARGUMENT, before
  // anything is sent, where the weights' shape, dtype and size do not fit together.
  absl::StatusOr<v1::Job> Submit(const JobRequest& request, const CallOptions& options = {}) const;

  absl::StatusOr<v1::Job> Get(const std::string& job_id, const CallOptions& options = {}) const;

  // Newest first, from all pages.
  absl::StatusOr<std::vector<v1::Job>> List(const JobFilter& filter = {},
                                            const CallOptions& options = {}) const;

  // The job as it is then; one that had ended stays as it was.
  absl::StatusOr<v1::Job> Cancel(const std::string& job_id, const CallOptions& options = {}) const;

  // NOT_FOUND also where an earlier try of this call deleted it and the answer was lost.
  absl::Status Delete(const std::string& job_id, const CallOptions& options = {}) const;

  // Calls `on_change` with the job as it is and whenever it changes, from the calling thread, until
  // a final state, which is returned. A watch that breaks goes on (RetryPolicy::resume_budget).
  absl::StatusOr<v1::Job> Watch(const std::string& job_id,
                                const std::function<void(const v1::Job&)>& on_change = {},
                                const CallOptions& options = {}) const;

  // The tensors and the certificate of a job that SUCCEEDED, sizes checked. A stream that breaks
  // goes on from the byte it came to. DATA_LOSS where the answer stops short.
  absl::StatusOr<QuantizeResult> ReadResult(const std::string& job_id,
                                            const CallOptions& options = {}) const;

 private:
  struct Connection;
  explicit JobClient(std::unique_ptr<Connection> connection);

  std::unique_ptr<Connection> connection_;
};

}  // namespace certiq

#endif  // CERTIQ_CLIENT_CPP_INCLUDE_CERTIQ_JOB_CLIENT_H_
