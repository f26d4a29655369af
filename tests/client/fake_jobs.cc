#include "fake_jobs.h"

#include <algorithm>

#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"

namespace certiq::testing {
namespace {

void AddTensor(const std::string& name, int64_t rows, int64_t columns, v1::ResultHeader* header) {
  v1::TensorHeader* const tensor = header->add_tensors();
  tensor->set_name(name);
  tensor->set_dtype(v1::DATA_TYPE_F32);
  tensor->add_shape(rows);
  tensor->add_shape(columns);
  header->set_total_bytes(header->total_bytes() + 4 * rows * columns);
}

grpc::Status Known(const std::string& id) {
  if (id == "j1") return grpc::Status::OK;
  return {grpc::StatusCode::NOT_FOUND, absl::StrCat("no job ", id)};
}

}  // namespace

FakeJobs::FakeJobs() {
  job.set_id("j1");
  job.set_state(v1::JOB_STATE_SUCCEEDED);
  job.set_layer_name("l.weight");
  job.set_calibration_id("c1");
  job.set_rows(3);
  job.set_features(4);
  AddTensor("weight", 3, 4, &header);
  AddTensor("scales", 3, 1, &header);
  for (int64_t i = 0; i < header.total_bytes(); ++i) bytes += static_cast<char>('A' + i % 60);
}

grpc::Status FakeJobs::CreateJob(grpc::ServerContext*,
                                 grpc::ServerReader<v1::CreateJobRequest>* reader,
                                 v1::Job* response) {
  const std::lock_guard lock(mutex_);
  v1::CreateJobRequest message;
  weights.clear();
  while (reader->Read(&message)) {
    if (message.has_header()) created.push_back(message.header());
    weights += message.weight().data();
  }
  *response = job;
  const int call = ++calls["create"];
  return on_create ? on_create(call).value_or(grpc::Status::OK) : grpc::Status::OK;
}

grpc::Status FakeJobs::GetJob(grpc::ServerContext*, const v1::GetJobRequest* request,
                              v1::Job* response) {
  *response = job;
  return Known(request->job_id());
}

grpc::Status FakeJobs::ListJobs(grpc::ServerContext*, const v1::ListJobsRequest* request,
                                v1::ListJobsResponse* response) {
  const std::lock_guard lock(mutex_);
  listed.push_back(*request);
  size_t page = 0;
  if (!request->page_token().empty() && !absl::SimpleAtoi(request->page_token(), &page)) {
    return {grpc::StatusCode::INVALID_ARGUMENT, "page_token"};
  }
  if (page < pages.size()) *response = pages[page];
  return grpc::Status::OK;
}

grpc::Status FakeJobs::CancelJob(grpc::ServerContext*, const v1::CancelJobRequest* request,
                                 v1::Job* response) {
  *response = job;
  return Known(request->job_id());
}

grpc::Status FakeJobs::DeleteJob(grpc::ServerContext*, const v1::DeleteJobRequest* request,
                                 google::protobuf::Empty*) {
  if (job.state() <= v1::JOB_STATE_RUNNING) {
    return {grpc::StatusCode::FAILED_PRECONDITION, "the job has not ended"};
  }
  return Known(request->job_id());
}

grpc::Status FakeJobs::WatchJob(grpc::ServerContext*, const v1::WatchJobRequest* request,
                                grpc::ServerWriter<v1::WatchJobResponse>* writer) {
  const std::lock_guard lock(mutex_);
  if (grpc::Status known = Known(request->job_id()); !known.ok()) return known;
  const auto call = static_cast<size_t>(calls["watch"]++);
  if (call >= watches.size()) return {grpc::StatusCode::INTERNAL, "no watch left"};
  for (const v1::JobState state : watches[call].first) {
    v1::WatchJobResponse response;
    *response.mutable_job() = job;
    response.mutable_job()->set_state(state);
    if (state == v1::JOB_STATE_RUNNING) response.mutable_job()->set_phase(v1::PHASE_ROUND);
    writer->Write(response);
  }
  return watches[call].second;
}

grpc::Status FakeJobs::ReadResult(grpc::ServerContext*, const v1::ReadResultRequest* request,
                                  grpc::ServerWriter<v1::ReadResultResponse>* writer) {
  const std::lock_guard lock(mutex_);
  if (job.state() != v1::JOB_STATE_SUCCEEDED) {
    return {grpc::StatusCode::FAILED_PRECONDITION, "the job has not succeeded"};
  }
  offsets.push_back(request->byte_offset());
  const auto call = static_cast<int>(offsets.size());
  const auto send = [&](v1::ReadResultResponse frame) {
    if (change) change(&frame);
    writer->Write(frame);
  };
  v1::ReadResultResponse frame;
  *frame.mutable_result() = header;
  send(frame);
  for (int64_t at = request->byte_offset(); at < static_cast<int64_t>(bytes.size());
       at += run_bytes) {
    if (on_run) {
      if (End end = on_run(call, at); end.has_value()) return *end;
    }
    frame.mutable_data()->set_byte_offset(at);
    frame.mutable_data()->set_data(
        bytes.substr(static_cast<size_t>(at), static_cast<size_t>(run_bytes)));
    send(frame);
  }
  // In two parts.
  v1::Certificate* const certificate = frame.mutable_certificate();
  certificate->set_rows(job.rows());
  certificate->set_features(job.features());
  certificate->set_calibration_id(job.calibration_id());
  certificate->add_row_bound(1);
  send(frame);
  if (on_run) {
    if (End end = on_run(call, static_cast<int64_t>(bytes.size())); end.has_value()) return *end;
  }
  frame.mutable_certificate()->Clear();
  frame.mutable_certificate()->add_row_bound(2);
  send(frame);
  return grpc::Status::OK;
}

}  // namespace certiq::testing
