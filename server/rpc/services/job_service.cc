// JobService.

#include <algorithm>
#include <cstdint>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "base/listener.h"
#include "base/status_macros.h"
#include "certiq/v1/job_service.pb.h"
#include "contract/enums.h"
#include "job/job_request.h"
#include "job/result.h"
#include "job/upload.h"
#include "rpc/calls/call.h"
#include "rpc/calls/unary_call.h"
#include "rpc/services/convert_job.h"
#include "rpc/services/services.h"

namespace certiq::server {
namespace {

const char* Name(v1::CreateJobRequest::PayloadCase payload) {
  switch (payload) {
    case v1::CreateJobRequest::kHeader:
      return "header";
    case v1::CreateJobRequest::kWeight:
      return "weight";
    case v1::CreateJobRequest::PAYLOAD_NOT_SET:
      break;
  }
  return "none";
}

// A job's header and weights; the answer comes when it is queued.
class CreateJobCall final : public Call {
 public:
  explicit CreateJobCall(CallStart start) : Call(std::move(start), OnDrain::kRefuse) {}

 protected:
  absl::Status Take(const Bytes& message) override {
    ASSIGN_OR_RETURN(const v1::CreateJobRequest request,
                     Parse<v1::CreateJobRequest>(message, "a CreateJobRequest"));
    if (upload_ == nullptr) return TakeHeader(request);
    switch (request.payload_case()) {
      case v1::CreateJobRequest::kHeader:
        return HeaderMisplaced();
      case v1::CreateJobRequest::kWeight:
        return upload_->AppendWeights(request.weight().row_offset(),
                                      AsBytes(request.weight().data()));
      case v1::CreateJobRequest::PAYLOAD_NOT_SET:
        break;
    }
    return base::InvalidField("payload", "expected weight, got none");
  }

  absl::Status End() override {
    if (upload_ == nullptr) return HeaderMissing();
    RETURN_IF_ERROR(upload_->Finish());
    ASSIGN_OR_RETURN(const JobView job, env_.jobs.Add(tenant_, *upload_));
    life_.summary.job_id = job.record.id();
    return Respond(ToProto(job));
  }

  // What was uploaded leaves no trace, and its places are free, before the client hears.
  void Drop() override { upload_.reset(); }

 private:
  absl::Status TakeHeader(const v1::CreateJobRequest& request) {
    if (!request.has_header()) return HeaderExpected(Name(request.payload_case()));
    ASSIGN_OR_RETURN(JobRequest job, ReadJobRequest(request.header()));
    life_.summary.request_id = job.request_id;
    life_.summary.layer_name = job.layer_name;
    life_.summary.calibration_id = job.calibration_id;
    life_.summary.rows = job.rows;
    life_.summary.features = job.features;
    ASSIGN_OR_RETURN(upload_, env_.jobs.Begin(tenant_, std::move(job), cancellation_));
    return absl::OkStatus();
  }

  std::unique_ptr<Upload> upload_;
};

// A job's state, again and again.
class WatchJobCall final : public Call {
 public:
  explicit WatchJobCall(CallStart start)
      : Call(std::move(start), OnDrain::kEnd),
        listener_(std::make_shared<base::Listener>([this] { Changed(); })) {}

 protected:
  absl::Status Take(const Bytes& message) override {
    ASSIGN_OR_RETURN(const v1::WatchJobRequest request,
                     Parse<v1::WatchJobRequest>(message, "a WatchJobRequest"));
    id_ = request.job_id();
    RETURN_IF_ERROR(env_.jobs.Get(tenant_, id_).status());
    life_.summary.job_id = id_;
    env_.jobs.events().Watch(id_, listener_);
    return absl::OkStatus();
  }

  absl::StatusOr<Produced> Produce(Bytes* outgoing) override {
    if (final_) return ended() ? Produced::kEnd : Produced::kNothingYet;
    ASSIGN_OR_RETURN(const JobView job, env_.jobs.Get(tenant_, id_));
    v1::WatchJobResponse response;
    *response.mutable_job() = ToProto(job);
    // Its place in the queue changes without anybody being told; it comes with other changes.
    std::string now = response.job().SerializeAsString();
    if (now == last_) return Produced::kNothingYet;
    last_ = std::move(now);
    final_ = IsFinal(job.record.state());
    RETURN_IF_ERROR(Serialize(response, outgoing));
    return Produced::kMessage;
  }

  void Gone() override {
    env_.jobs.events().Unwatch(id_, listener_);
    listener_->Detach();
  }

 private:
  const std::shared_ptr<base::Listener> listener_;
  std::string id_;
  std::string last_;
  bool final_ = false;
};

// A stored result: its header, its bytes, its certificate.
class ReadResultCall final : public Call {
 public:
  explicit ReadResultCall(CallStart start) : Call(std::move(start), OnDrain::kIgnore) {}

 protected:
  absl::Status Take(const Bytes& message) override {
    ASSIGN_OR_RETURN(const v1::ReadResultRequest request,
                     Parse<v1::ReadResultRequest>(message, "a ReadResultRequest"));
    ASSIGN_OR_RETURN(reader_,
                     env_.jobs.OpenResult(tenant_, request.job_id(), request.byte_offset()));
    // A frame as it is made, and as the client has not read it yet.
    RETURN_IF_ERROR(
        Hold(limits_.held_bytes + 2 * std::min(kFrameBytes, reader_->record().tensor_bytes())));
    life_.summary.job_id = request.job_id();
    return absl::OkStatus();
  }

  absl::StatusOr<Produced> Produce(Bytes* outgoing) override {
    v1::ReadResultResponse response;
    if (!header_sent_) {
      header_sent_ = true;
      *response.mutable_result() = reader_->record().header();
    } else if (reader_->at_tensors()) {
      v1::ResultBytes& data = *response.mutable_data();
      data.set_byte_offset(reader_->offset());
      RETURN_IF_ERROR(reader_->ReadBytes(
          std::min(kFrameBytes, reader_->record().tensor_bytes() - reader_->offset()),
          *data.mutable_data()));
    } else if (!reader_->at_end()) {
      RETURN_IF_ERROR(reader_->ReadCertificate(*response.mutable_certificate()));
    } else {
      return ended() ? Produced::kEnd : Produced::kNothingYet;
    }
    RETURN_IF_ERROR(Serialize(response, outgoing));
    return Produced::kMessage;
  }

 private:
  std::unique_ptr<ResultReader> reader_;
  bool header_sent_ = false;
};

absl::Status GetJob(const CallEnvironment& env, const Tenant& tenant,
                    const v1::GetJobRequest& asked, v1::Job& job) {
  ASSIGN_OR_RETURN(const JobView view, env.jobs.Get(tenant, asked.job_id()));
  job = ToProto(view);
  return absl::OkStatus();
}

absl::Status ListJobs(const CallEnvironment& env, const Tenant& tenant,
                      const v1::ListJobsRequest& asked, v1::ListJobsResponse& list) {
  std::vector<JobState> states;
  for (const int state : asked.states()) {
    ASSIGN_OR_RETURN(states.emplace_back(), ReadJobState(state));
  }
  ASSIGN_OR_RETURN(const PageRequest page, ReadPageRequest(asked.page_size(), asked.page_token()));
  ASSIGN_OR_RETURN(const std::vector<JobView> views,
                   env.jobs.List(tenant, std::move(states), asked.calibration_id(), page,
                                 *list.mutable_next_page_token()));
  for (const JobView& view : views) *list.add_jobs() = ToProto(view);
  return absl::OkStatus();
}

absl::Status CancelJob(const CallEnvironment& env, const Tenant& tenant,
                       const v1::CancelJobRequest& asked, v1::Job& job) {
  ASSIGN_OR_RETURN(const JobView view,
                   env.jobs.Cancel(tenant, asked.job_id(), absl::StatusCode::kCancelled));
  job = ToProto(view);
  return absl::OkStatus();
}

absl::Status DeleteJob(const CallEnvironment& env, const Tenant& tenant,
                       const v1::DeleteJobRequest& asked, google::protobuf::Empty& /*nothing*/) {
  return env.jobs.Remove(tenant, asked.job_id());
}

}  // namespace

void AddJobMethods(Router& router) {
  router.Add<CreateJobCall>(kCreateJobMethod, Scope::kWrite, {.message_bytes = kMaxMessageBytes});
  router.Add<UnaryCall<v1::GetJobRequest, v1::Job>>(kGetJobMethod, Scope::kRead, {},
                                                    OnDrain::kIgnore, GetJob);
  router.Add<UnaryCall<v1::ListJobsRequest, v1::ListJobsResponse>>(kListJobsMethod, Scope::kRead,
                                                                   {}, OnDrain::kIgnore, ListJobs);
  router.Add<UnaryCall<v1::CancelJobRequest, v1::Job>>(kCancelJobMethod, Scope::kWrite, {},
                                                       OnDrain::kIgnore, CancelJob);
  router.Add<UnaryCall<v1::DeleteJobRequest, google::protobuf::Empty>>(
      kDeleteJobMethod, Scope::kWrite, {}, OnDrain::kIgnore, DeleteJob);
  router.Add<WatchJobCall>(kWatchJobMethod, Scope::kRead, {});
  router.Add<ReadResultCall>(kReadResultMethod, Scope::kRead, {});
}

}  // namespace certiq::server
