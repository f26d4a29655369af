#include "rpc/services/job_calls.h"

#include <algorithm>
#include <cstring>
#include <optional>
#include <set>
#include <string>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "base/status.h"
#include "certiq/v1/job_service.grpc.pb.h"
#include "contract/enums.h"
#include "rpc/calls/message_reactor.h"
#include "rpc/calls/refuse.h"
#include "rpc/calls/sending_reactor.h"
#include "rpc/calls/unary_reactor.h"
#include "rpc/services/convert_job.h"

namespace certiq::server {
namespace {

using Context = grpc::CallbackServerContext;
using JobPtr = std::shared_ptr<StoredJob>;

constexpr int64_t kFrameBytes = int64_t{1} << 20;

// A job's header and weights; the answer comes when it is queued.
class CreateJobReactor final : public MessageReactor<grpc::ServerReadReactor<Bytes>> {
 public:
  CreateJobReactor(Context* context, const CallEnvironment& environment, const Tenant& tenant,
                   Bytes* response)
      : MessageReactor(context, environment, kCreateJobMethod, tenant), response_(response) {}

 protected:
  absl::Status Take(const Bytes& message) override {
    if (upload_ != nullptr) return TakeNext(message);
    absl::Status taken = TakeNext(message);
    CountRejection(taken, env_.jobs.observer);
    return taken;
  }

  absl::Status End() override {
    if (upload_ == nullptr) {
      return base::InvalidField("header",
                                "expected as the first message, the stream ended without one");
    }
    const auto job = upload_->Finish();
    if (!job.ok()) return job.status();
    life_.summary.job_id = (*job)->id();
    return Serialize(ToProto((*job)->View()), response_)
               ? absl::OkStatus()
               : absl::InternalError("a response could not be serialized");
  }

  // What was uploaded leaves no trace, and its places are free, before the client hears.
  void Drop() override { upload_.reset(); }
  int64_t ResponseBytes() const override { return static_cast<int64_t>(response_->Length()); }

 private:
  absl::Status TakeNext(const Bytes& message) {
    const auto request = Parse<v1::CreateJobRequest>(message, "a CreateJobRequest");
    if (!request.ok()) return request.status();
    if (request->has_header() != (upload_ == nullptr)) {
      return base::InvalidField("header", "expected as the first message, and only there");
    }
    if (request->has_header()) return Begun(request->header());
    if (!request->has_weight()) {
      return base::InvalidField("payload", "expected weight, got none");
    }
    const std::string& data = request->weight().data();
    return upload_->Append(request->weight().row_offset(),
                           std::as_bytes(std::span(data.data(), data.size())));
  }

  absl::Status Begun(const v1::CreateJobHeader& header) {
    absl::StatusOr<JobRequest> request = FromProto(header);
    if (!request.ok()) return request.status();
    life_.summary.request_id = request->request_id;
    life_.summary.layer_name = request->layer_name;
    life_.summary.rows = request->rows;
    life_.summary.features = request->features;
    auto upload = env_.manager.Begin(tenant_, *std::move(request));
    if (!upload.ok()) return upload.status();
    upload_ = *std::move(upload);
    return absl::OkStatus();
  }

  Bytes* const response_;
  std::unique_ptr<JobUpload> upload_;
};

// A job's state, again and again.
class WatchReactor final : public SendingReactor<v1::WatchJobResponse> {
 public:
  WatchReactor(Context* context, const CallEnvironment& environment, const Tenant& tenant,
               JobPtr job, int64_t request_bytes)
      : SendingReactor(context, environment, kWatchJobMethod, tenant, request_bytes),
        job_(std::move(job)),
        listener_(std::make_shared<base::Listener>([this] { Changed(); })) {
    life_.summary.job_id = job_->id();
    job_->Watch(listener_);
  }

 protected:
  absl::StatusOr<Made> Make(v1::WatchJobResponse& message) override {
    if (final_) return Made::kEnd;
    *message.mutable_job() = ToProto(job_->View());
    // Its place in the queue changes without anybody being told; it comes with other changes.
    std::string now = message.job().SerializeAsString();
    if (now == last_) return Made::kNothingYet;
    last_ = std::move(now);
    final_ = message.job().state() >= v1::JOB_STATE_SUCCEEDED;
    return Made::kMessage;
  }
  void Gone() override {
    job_->Unwatch(listener_);
    listener_->Detach();
  }
  // The client watches on with the next server.
  bool EndsWithDrain() const override { return true; }

 private:
  const JobPtr job_;
  const std::shared_ptr<base::Listener> listener_;
  std::string last_;
  bool final_ = false;
};

// A stored result, block by block.
class ResultReactor final : public SendingReactor<v1::ReadResultResponse> {
 public:
  ResultReactor(Context* context, const CallEnvironment& environment, const Tenant& tenant,
                JobPtr job, int64_t offset, int64_t request_bytes)
      : SendingReactor(context, environment, kReadResultMethod, tenant, request_bytes),
        job_(std::move(job)),
        offset_(offset) {
    life_.summary.job_id = job_->id();
  }

 protected:
  absl::StatusOr<Made> Make(v1::ReadResultResponse& message) override {
    if (reader_ == nullptr) return Begun(message);
    if (offset_ < record_.result_tensor_bytes) {
      const int64_t bytes = std::min(kFrameBytes, record_.result_tensor_bytes - offset_);
      message.mutable_data()->set_byte_offset(offset_);
      std::string& data = *message.mutable_data()->mutable_data();
      data.resize(static_cast<size_t>(bytes));
      absl::Status read = Read(std::as_writable_bytes(std::span(data)));
      if (!read.ok()) return read;
      return Made::kMessage;
    }
    if (offset_ >= reader_->bytes()) return Made::kEnd;
    uint32_t length = 0;
    absl::Status read = Read(std::as_writable_bytes(std::span(&length, 1)));
    std::string part;
    if (read.ok() && length <= reader_->bytes() - offset_) {
      part.resize(length);
      read = Read(std::as_writable_bytes(std::span(part)));
    }
    if (!read.ok()) return read;
    if (!message.mutable_certificate()->ParseFromString(part)) {
      return absl::DataLossError(
          absl::StrCat("the stored certificate in ", record_.result.name, " does not parse"));
    }
    return Made::kMessage;
  }

 private:
  absl::StatusOr<Made> Begun(v1::ReadResultResponse& message) {
    record_ = job_->View().record;
    if (record_.state != JobState::kSucceeded) {
      return base::PreconditionError(
          "NOT_SUCCEEDED", record_.id,
          absl::StrCat("the job is ", NameOf(ToWire(record_.state, kJobStates)),
                       ", only one that succeeded has a result"));
    }
    if (offset_ < 0 || offset_ > record_.result_tensor_bytes) {
      return base::InvalidField(
          "byte_offset",
          absl::StrCat("expected 0 to ", record_.result_tensor_bytes, ", got ", offset_));
    }
    auto reader = env_.jobs.store.OpenBlob(record_.result);
    if (!reader.ok()) return reader.status();
    reader_ = *std::move(reader);
    if (!message.mutable_result()->ParseFromString(record_.result_header)) {
      return absl::DataLossError("the stored header of the result does not parse");
    }
    return Made::kMessage;
  }

  absl::Status Read(std::span<std::byte> to) {
    if (offset_ + static_cast<int64_t>(to.size()) > reader_->bytes()) {
      return absl::DataLossError(
          absl::StrCat("the result in ", record_.result.name, " is cut off"));
    }
    absl::Status read = reader_->Read(offset_, to);
    offset_ += static_cast<int64_t>(to.size());
    return read;
  }

  const JobPtr job_;
  int64_t offset_;
  JobRecord record_;
  std::unique_ptr<BlobReader> reader_;
};

class JobService final
    : public v1::JobService::WithRawCallbackMethod_CreateJob<
          v1::JobService::WithCallbackMethod_GetJob<v1::JobService::WithCallbackMethod_ListJobs<
              v1::JobService::WithCallbackMethod_CancelJob<
                  v1::JobService::WithCallbackMethod_DeleteJob<
                      v1::JobService::WithCallbackMethod_WatchJob<
                          v1::JobService::WithCallbackMethod_ReadResult<
                              v1::JobService::Service>>>>>>> {
 public:
  explicit JobService(const CallEnvironment& environment) : env_(environment) {}

  grpc::ServerReadReactor<Bytes>* CreateJob(Context* context, Bytes* response) override {
    const auto tenant = env_.auth->Authenticate(*context, Scope::kWrite);
    if (!tenant.ok()) {
      return Refuse<grpc::ServerReadReactor<Bytes>>(env_, kCreateJobMethod, tenant.status());
    }
    auto* const reactor = new CreateJobReactor(context, env_, *tenant, response);
    reactor->Begin();
    return reactor;
  }

  grpc::ServerUnaryReactor* GetJob(Context* context, const v1::GetJobRequest* request,
                                   v1::Job* response) override {
    return Answer(context, kGetJobMethod, Scope::kRead, *request, response,
                  [this, request, response](const Tenant& tenant) {
                    const auto job = env_.manager.Find(tenant, request->job_id());
                    if (job.ok()) *response = ToProto((*job)->View());
                    return job.status();
                  });
  }

  grpc::ServerUnaryReactor* ListJobs(Context* context, const v1::ListJobsRequest* request,
                                     v1::ListJobsResponse* response) override {
    return Answer(context, kListJobsMethod, Scope::kRead, *request, response,
                  [this, request, response](const Tenant& tenant) {
                    return List(tenant, *request, *response);
                  });
  }

  grpc::ServerUnaryReactor* CancelJob(Context* context, const v1::CancelJobRequest* request,
                                      v1::Job* response) override {
    return Answer(context, kCancelJobMethod, Scope::kWrite, *request, response,
                  [this, request, response](const Tenant& tenant) {
                    const auto job = env_.manager.Find(tenant, request->job_id());
                    if (!job.ok()) return job.status();
                    (*job)->Cancel(absl::StatusCode::kCancelled);
                    *response = ToProto((*job)->View());
                    return absl::OkStatus();
                  });
  }

  grpc::ServerUnaryReactor* DeleteJob(Context* context, const v1::DeleteJobRequest* request,
                                      google::protobuf::Empty* response) override {
    return Answer(context, kDeleteJobMethod, Scope::kWrite, *request, response,
                  [this, request](const Tenant& tenant) {
                    return env_.manager.Remove(tenant, request->job_id());
                  });
  }

  grpc::ServerWriteReactor<v1::WatchJobResponse>* WatchJob(
      Context* context, const v1::WatchJobRequest* request) override {
    return OfJob<WatchReactor, v1::WatchJobResponse>(context, kWatchJobMethod, *request);
  }

  grpc::ServerWriteReactor<v1::ReadResultResponse>* ReadResult(
      Context* context, const v1::ReadResultRequest* request) override {
    return OfJob<ResultReactor, v1::ReadResultResponse>(context, kReadResultMethod, *request,
                                                        request->byte_offset());
  }

 private:
  absl::Status List(const Tenant& tenant, const v1::ListJobsRequest& request,
                    v1::ListJobsResponse& response) const {
    std::set<JobState> states;
    for (const int state : request.states()) {
      const auto known = FromWire(static_cast<v1::JobState>(state), kJobStates, "states");
      if (!known.ok()) return known.status();
      states.insert(*known);
    }
    const auto page = env_.manager.List(tenant, states, request.calibration_id(),
                                        request.page_size(), request.page_token());
    if (!page.ok()) return page.status();
    for (const JobView& view : page->items) *response.add_jobs() = ToProto(view);
    response.set_next_page_token(page->next_page_token);
    return absl::OkStatus();
  }

  // On the pool.
  template <typename Request, typename Response>
  grpc::ServerUnaryReactor* Answer(Context* context, const RpcMethod& method, Scope scope,
                                   const Request& request, Response* response,
                                   std::function<absl::Status(const Tenant&)> work) {
    const auto tenant = env_.auth->Authenticate(*context, scope);
    if (!tenant.ok()) return Refuse<grpc::ServerUnaryReactor>(env_, method, tenant.status());
    auto* const reactor = new UnaryReactor<Response>(
        env_, method, *tenant, static_cast<int64_t>(request.ByteSizeLong()), response);
    reactor->Begin(env_.jobs.pool, nullptr,
                   [tenant = *tenant, work = std::move(work)] { return work(tenant); });
    return reactor;
  }

  // A stream about the job that the request names.
  template <typename Reactor, typename Message, typename Request, typename... More>
  grpc::ServerWriteReactor<Message>* OfJob(Context* context, const RpcMethod& method,
                                           const Request& request, More... more) {
    using Base = grpc::ServerWriteReactor<Message>;
    const auto tenant = env_.auth->Authenticate(*context, Scope::kRead);
    if (!tenant.ok()) return Refuse<Base>(env_, method, tenant.status());
    auto job = env_.manager.Find(*tenant, request.job_id());
    if (!job.ok()) return Refuse<Base>(env_, method, job.status());
    if (std::is_same_v<Reactor, WatchReactor> && !env_.jobs.pool.admitting()) {
      return Refuse<Base>(env_, method,
                          absl::UnavailableError("the server is draining; the job goes on later"));
    }
    auto* const reactor = new Reactor(context, env_, *tenant, *std::move(job), more...,
                                      static_cast<int64_t>(request.ByteSizeLong()));
    reactor->Begin();
    return reactor;
  }

  const CallEnvironment& env_;
};

}  // namespace

std::unique_ptr<grpc::Service> MakeJobService(const CallEnvironment& environment) {
  return std::make_unique<JobService>(environment);
}

}  // namespace certiq::server
