#include "certiq/job_client.h"

#include <utility>

#include "absl/strings/str_cat.h"
#include "base/status_macros.h"
#include "certiq/durations.h"
#include "certiq/status.h"
#include "certiq/uuid.h"
#include "certiq/v1/job_service.grpc.pb.h"
#include "connection.h"
#include "request_check.h"
#include "result_collector.h"
#include "rows.h"
#include "unary.h"

namespace certiq {
namespace {

using Stub = v1::JobService::StubInterface;

v1::CreateJobHeader HeaderFor(const JobRequest& request) {
  v1::CreateJobHeader header;
  header.set_request_id(request.request_id.empty() ? RandomUuid() : request.request_id);
  header.set_layer_name(request.layer_name);
  *header.mutable_spec() = request.spec;
  *header.mutable_weight() = HeaderOf(request.weight);
  header.set_calibration_id(request.calibration_id);
  header.set_priority(request.priority);
  if (request.deadline.has_value()) *header.mutable_deadline() = ToProto(*request.deadline);
  if (request.ttl.has_value()) *header.mutable_ttl() = ToProto(*request.ttl);
  return header;
}

// What ended a read, found here or the server's status.
AttemptOutcome Resumable(AttemptOutcome outcome, const absl::Status& read_error, bool progressed,
                         bool resumable) {
  outcome.progressed = progressed;
  outcome.resumable = resumable;
  if (!read_error.ok()) {
    outcome.status = read_error;
    outcome.local = true;
  }
  return outcome;
}

}  // namespace

struct JobClient::Connection : ServiceConnection<v1::JobService> {};

JobClient::JobClient(std::unique_ptr<Connection> connection) : connection_(std::move(connection)) {}
JobClient::~JobClient() = default;

bool IsFinal(v1::JobState state) { return state >= v1::JOB_STATE_SUCCEEDED; }

absl::Status JobError(const v1::Job& job) { return FromRpcStatus(job.error()); }

absl::StatusOr<std::unique_ptr<JobClient>> JobClient::Create(ClientOptions options) {
  ASSIGN_OR_RETURN(auto connection, ConnectTo<v1::JobService>(std::move(options)));
  return std::unique_ptr<JobClient>(
      new JobClient(std::make_unique<Connection>(Connection{std::move(connection)})));
}

absl::StatusOr<v1::Job> JobClient::Submit(const JobRequest& request,
                                          const CallOptions& options) const {
  RETURN_IF_ERROR(CheckWeight(request.weight));
  // All tries send the same header, and so the same request_id.
  v1::CreateJobRequest first;
  *first.mutable_header() = HeaderFor(request);
  const auto total = static_cast<int64_t>(request.weight.data.size());
  v1::Job job;
  const absl::Status status =
      RunRetryLoop(connection_->options, options, [&](absl::Time deadline) -> AttemptOutcome {
        CallContext context(deadline, options.cancel);
        job.Clear();
        const auto stream = connection_->stub->CreateJob(context.get(), &job);
        int64_t sent = 0;
        // A write that fails means that the server has ended the call; Finish says why.
        const bool wrote = stream->Write(first);
        const bool uploaded =
            wrote && SendWeight<v1::CreateJobRequest>(
                         request.weight, connection_->options.chunk_bytes,
                         [&](const v1::CreateJobRequest& frame, size_t bytes) {
                           if (!stream->Write(frame)) return false;
                           sent += static_cast<int64_t>(bytes);
                           if (options.progress) {
                             options.progress(UploadProgress{.bytes = sent, .total_bytes = total});
                           }
                           return true;
                         });
        stream->WritesDone();
        AttemptOutcome outcome = context.Outcome(stream->Finish(), wrote);
        // A repeated request is answered from its header.
        if (outcome.status.ok() && !uploaded && job.id().empty()) {
          return Resumable(outcome,
                           absl::InternalError("the server's answer breaks the contract: the call "
                                               "ended well before everything was sent"),
                           false, false);
        }
        return outcome;
      });
  RETURN_IF_ERROR(status);
  if (job.id().empty()) {
    return absl::InternalError("the server's answer breaks the contract: job.id: expected one");
  }
  return job;
}

absl::StatusOr<v1::Job> JobClient::Get(const std::string& job_id,
                                       const CallOptions& options) const {
  v1::GetJobRequest request;
  request.set_job_id(job_id);
  return CallUnary(*connection_, &Stub::GetJob, request, options);
}

absl::StatusOr<std::vector<v1::Job>> JobClient::List(const JobFilter& filter,
                                                     const CallOptions& options) const {
  v1::ListJobsRequest request;
  request.set_page_size(filter.page_size);
  request.set_calibration_id(filter.calibration_id);
  for (const v1::JobState state : filter.states) request.add_states(state);
  return CallPages<v1::Job>(*connection_, &Stub::ListJobs, request, options,
                            [](v1::ListJobsResponse* page) { return page->mutable_jobs(); });
}

absl::StatusOr<v1::Job> JobClient::Cancel(const std::string& job_id,
                                          const CallOptions& options) const {
  v1::CancelJobRequest request;
  request.set_job_id(job_id);
  return CallUnary(*connection_, &Stub::CancelJob, request, options);
}

absl::Status JobClient::Delete(const std::string& job_id, const CallOptions& options) const {
  v1::DeleteJobRequest request;
  request.set_job_id(job_id);
  return CallUnary(*connection_, &Stub::DeleteJob, request, options).status();
}

absl::StatusOr<v1::Job> JobClient::Watch(const std::string& job_id,
                                         const std::function<void(const v1::Job&)>& on_change,
                                         const CallOptions& options) const {
  v1::WatchJobRequest request;
  request.set_job_id(job_id);
  v1::WatchJobResponse response;
  bool came_once = false;
  const absl::Status status =
      RunRetryLoop(connection_->options, options, [&](absl::Time deadline) -> AttemptOutcome {
        CallContext context(deadline, options.cancel);
        const auto stream = connection_->stub->WatchJob(context.get(), request);
        bool came = false;
        bool ended = false;
        while (stream->Read(&response)) {
          came = came_once = true;
          if (on_change) on_change(response.job());
          // Nothing follows, so that the end of the stream is not awaited.
          if (ended = IsFinal(response.job().state()); ended) break;
        }
        if (ended) context.get()->TryCancel();
        AttemptOutcome outcome = context.Outcome(stream->Finish(), came);
        if (ended) {
          outcome.status = absl::OkStatus();
          return outcome;
        }
        const absl::Status early =
            outcome.status.ok() ? absl::InternalError(
                                      "the server's answer breaks the contract: the watch ended "
                                      "before the job did")
                                : absl::OkStatus();
        return Resumable(outcome, early, came, came_once);
      });
  RETURN_IF_ERROR(status);
  return std::move(*response.mutable_job());
}

absl::StatusOr<QuantizeResult> JobClient::ReadResult(const std::string& job_id,
                                                     const CallOptions& options) const {
  // The shape bounds the memory that the result may claim.
  ASSIGN_OR_RETURN(const v1::Job job, Get(job_id, options));
  if (job.rows() < 1 || job.features() < 1) {
    return absl::InternalError(
        absl::StrCat("the server's answer breaks the contract: job: expected rows and features of "
                     "at least 1, got ",
                     job.rows(), " and ", job.features()));
  }
  ResultCollector collector(job.rows(), job.features());
  v1::ReadResultRequest request;
  request.set_job_id(job_id);
  const absl::Status status =
      RunRetryLoop(connection_->options, options, [&](absl::Time deadline) -> AttemptOutcome {
        CallContext context(deadline, options.cancel);
        const int64_t before = collector.received_bytes();
        request.set_byte_offset(before);
        collector.Resume();
        const auto stream = connection_->stub->ReadResult(context.get(), request);
        v1::ReadResultResponse frame;
        absl::Status read_error;
        bool came = false;
        while (stream->Read(&frame)) {
          came = true;
          if (read_error.ok()) read_error = collector.Add(frame);
          if (!read_error.ok()) context.get()->TryCancel();
        }
        return Resumable(context.Outcome(stream->Finish(), came), read_error,
                         collector.received_bytes() > before, collector.started());
      });
  RETURN_IF_ERROR(status);
  return std::move(collector).Finish();
}

}  // namespace certiq
