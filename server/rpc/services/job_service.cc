// JobService.

#include <algorithm>
#include <cstdint>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "base/listener.h"
#include "base/status_macros.h"
#include "certiq/v1/job_service.grpc.pb.h"
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

using Context = grpc::CallbackServerContext;

constexpr int64_t kFrameBytes = int64_t{1} << 20;

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
class CreateJobCall final : public Call<ClientStreamReactor> {
 public:
  explicit CreateJobCall(const CallStart& start) : Call(start, OnDrain::kRefuse) {}

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
class WatchJobCall final : public Call<ServerStreamReactor> {
 public:
  explicit WatchJobCall(const CallStart& start)
      : Call(start, OnDrain::kEnd),
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
class ReadResultCall final : public Call<ServerStreamReactor> {
 public:
  explicit ReadResultCall(const CallStart& start) : Call(start, OnDrain::kIgnore) {}

 protected:
  absl::Status Take(const Bytes& message) override {
    ASSIGN_OR_RETURN(const v1::ReadResultRequest request,
                     Parse<v1::ReadResultRequest>(message, "a ReadResultRequest"));
    ASSIGN_OR_RETURN(reader_,
                     env_.jobs.OpenResult(tenant_, request.job_id(), request.byte_offset()));
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

class JobService final : public v1::JobService::WithRawCallbackMethod_CreateJob<
                             v1::JobService::WithRawCallbackMethod_GetJob<
                                 v1::JobService::WithRawCallbackMethod_ListJobs<
                                     v1::JobService::WithRawCallbackMethod_CancelJob<
                                         v1::JobService::WithRawCallbackMethod_DeleteJob<
                                             v1::JobService::WithRawCallbackMethod_WatchJob<
                                                 v1::JobService::WithRawCallbackMethod_ReadResult<
                                                     v1::JobService::Service>>>>>>> {
 public:
  explicit JobService(const CallEnvironment& environment) : env_(environment) {}

  ClientStreamReactor* CreateJob(Context* context, Bytes* response) override {
    return StartCall<CreateJobCall>(context, env_, kCreateJobMethod, Scope::kWrite,
                                    /*request=*/nullptr, response);
  }

  UnaryReactor* GetJob(Context* context, const Bytes* request, Bytes* response) override {
    return Answer<v1::GetJobRequest, v1::Job>(
        context, kGetJobMethod, Scope::kRead, request, response,
        [this](const Tenant& tenant, const v1::GetJobRequest& asked, v1::Job& job) {
          ASSIGN_OR_RETURN(const JobView view, env_.jobs.Get(tenant, asked.job_id()));
          job = ToProto(view);
          return absl::OkStatus();
        });
  }

  UnaryReactor* ListJobs(Context* context, const Bytes* request, Bytes* response) override {
    return Answer<v1::ListJobsRequest, v1::ListJobsResponse>(
        context, kListJobsMethod, Scope::kRead, request, response,
        [this](const Tenant& tenant, const v1::ListJobsRequest& asked,
               v1::ListJobsResponse& list) -> absl::Status {
          std::vector<JobState> states;
          for (const int state : asked.states()) {
            ASSIGN_OR_RETURN(states.emplace_back(), ReadJobState(state));
          }
          ASSIGN_OR_RETURN(const PageRequest page,
                           ReadPageRequest(asked.page_size(), asked.page_token()));
          ASSIGN_OR_RETURN(const std::vector<JobView> views,
                           env_.jobs.List(tenant, std::move(states), asked.calibration_id(), page,
                                          *list.mutable_next_page_token()));
          for (const JobView& view : views) *list.add_jobs() = ToProto(view);
          return absl::OkStatus();
        });
  }

  UnaryReactor* CancelJob(Context* context, const Bytes* request, Bytes* response) override {
    return Answer<v1::CancelJobRequest, v1::Job>(
        context, kCancelJobMethod, Scope::kWrite, request, response,
        [this](const Tenant& tenant, const v1::CancelJobRequest& asked, v1::Job& job) {
          ASSIGN_OR_RETURN(const JobView view,
                           env_.jobs.Cancel(tenant, asked.job_id(), absl::StatusCode::kCancelled));
          job = ToProto(view);
          return absl::OkStatus();
        });
  }

  UnaryReactor* DeleteJob(Context* context, const Bytes* request, Bytes* response) override {
    return Answer<v1::DeleteJobRequest, google::protobuf::Empty>(
        context, kDeleteJobMethod, Scope::kWrite, request, response,
        [this](const Tenant& tenant, const v1::DeleteJobRequest& asked,
               google::protobuf::Empty& /*nothing*/) {
          return env_.jobs.Remove(tenant, asked.job_id());
        });
  }

  ServerStreamReactor* WatchJob(Context* context, const Bytes* request) override {
    return StartCall<WatchJobCall>(context, env_, kWatchJobMethod, Scope::kRead, request,
                                   /*response=*/nullptr);
  }

  ServerStreamReactor* ReadResult(Context* context, const Bytes* request) override {
    return StartCall<ReadResultCall>(context, env_, kReadResultMethod, Scope::kRead, request,
                                     /*response=*/nullptr);
  }

 private:
  template <typename Request, typename Response>
  UnaryReactor* Answer(Context* context, const RpcMethod& method, Scope scope, const Bytes* request,
                       Bytes* response, typename UnaryCall<Request, Response>::Work work) {
    return StartCall<UnaryCall<Request, Response>>(context, env_, method, scope, request, response,
                                                   OnDrain::kIgnore, std::move(work));
  }

  const CallEnvironment& env_;
};

}  // namespace

std::unique_ptr<grpc::Service> MakeJobService(const CallEnvironment& environment) {
  return std::make_unique<JobService>(environment);
}

}  // namespace certiq::server
