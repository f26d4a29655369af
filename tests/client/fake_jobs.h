// Fake JobService with one job, which answers as a test says.
#ifndef CERTIQ_TESTS_CLIENT_FAKE_JOBS_H_
#define CERTIQ_TESTS_CLIENT_FAKE_JOBS_H_

#include <cstdint>
#include <functional>
#include <map>
#include <mutex>
#include <optional>
#include <string>
#include <vector>

#include "certiq/v1/job_service.grpc.pb.h"
#include "grpcpp/support/status.h"

namespace certiq::testing {

// Its job is "j1". Set everything before the first call; read it after the last one.
class FakeJobs final : public v1::JobService::Service {
 public:
  using End = std::optional<grpc::Status>;

  FakeJobs();

  // A client that cancelled is back before the call's handler is: waits for the latter.
  void Wait() { const std::lock_guard lock(mutex_); }

  v1::Job job;
  // What ListJobs answers, one page an element.
  std::vector<v1::ListJobsResponse> pages;
  // One list of states for each WatchJob call; it ends with the status beside it.
  std::vector<std::pair<std::vector<v1::JobState>, grpc::Status>> watches;
  // The result: "weight" F32 [rows, features], then "scales" F32 [rows, 1].
  v1::ResultHeader header;
  std::string bytes;
  int64_t run_bytes = 7;
  // Before a run of the result at `offset` is sent by ReadResult call `call`, from 1.
  std::function<End(int call, int64_t offset)> on_run;
  std::function<void(v1::ReadResultResponse*)> change;
  // Instead of OK at the end of CreateJob call `call`, from 1.
  std::function<End(int call)> on_create;

  std::vector<v1::CreateJobHeader> created;
  std::string weights;
  std::vector<int64_t> offsets;
  std::vector<v1::ListJobsRequest> listed;
  std::map<std::string, int> calls;

  grpc::Status CreateJob(grpc::ServerContext*, grpc::ServerReader<v1::CreateJobRequest>*,
                         v1::Job*) override;
  grpc::Status GetJob(grpc::ServerContext*, const v1::GetJobRequest*, v1::Job*) override;
  grpc::Status ListJobs(grpc::ServerContext*, const v1::ListJobsRequest*,
                        v1::ListJobsResponse*) override;
  grpc::Status CancelJob(grpc::ServerContext*, const v1::CancelJobRequest*, v1::Job*) override;
  grpc::Status DeleteJob(grpc::ServerContext*, const v1::DeleteJobRequest*,
                         google::protobuf::Empty*) override;
  grpc::Status WatchJob(grpc::ServerContext*, const v1::WatchJobRequest*,
                        grpc::ServerWriter<v1::WatchJobResponse>*) override;
  grpc::Status ReadResult(grpc::ServerContext*, const v1::ReadResultRequest*,
                          grpc::ServerWriter<v1::ReadResultResponse>*) override;

 private:
  std::mutex mutex_;
};

}  // namespace certiq::testing

#endif  // CERTIQ_TESTS_CLIENT_FAKE_JOBS_H_
