// Jobs: made once, followed to the end, their results read whatever breaks.
#include "certiq/job_client.h"

#include <string>
#include <utility>
#include <vector>

#include "certiq/status.h"
#include "fake_jobs.h"
#include "fake_server.h"
#include "gtest/gtest.h"
#include "test_client.h"
#include "test_util.h"

namespace certiq {
namespace {

using testing::Contains;
using testing::FakeJobs;
using testing::FakeServer;
using testing::MakeTensor;
using testing::PatientClient;

grpc::Status Unavailable() { return {grpc::StatusCode::UNAVAILABLE, "the server stops"}; }

class JobClientTest : public ::testing::Test {
 protected:
  JobRequest Request() const {
    JobRequest request;
    request.layer_name = "l.weight";
    request.weight = weight_.View();
    request.calibration_id = "c1";
    return request;
  }

  OwnedTensor weight_ = MakeTensor("l.weight", v1::DATA_TYPE_F32, {3, 4});
  FakeJobs service_;
  FakeServer server_{std::vector<grpc::Service*>{&service_}};
  PatientClient<JobClient> client_{server_.address(), {.chunk_bytes = 20}};
};

TEST_F(JobClientTest, SubmitsEverythingUnderOneRequestId) {
  service_.on_create = [](int call) -> FakeJobs::End {
    if (call == 1) return Unavailable();
    return std::nullopt;
  };
  JobRequest request = Request();
  request.spec.set_bits(3);
  request.priority = -5;
  request.deadline = absl::Milliseconds(1500);
  const auto job = client_->Submit(request);
  ASSERT_TRUE(job.ok()) << job.status();
  EXPECT_EQ(job->id(), "j1");
  ASSERT_EQ(service_.created.size(), 2);
  const v1::CreateJobHeader& header = service_.created[0];
  EXPECT_EQ(header.request_id().size(), 36);
  EXPECT_EQ(header.request_id(), service_.created[1].request_id());
  EXPECT_EQ(header.spec().bits(), 3);
  EXPECT_EQ(header.priority(), -5);
  EXPECT_EQ(header.deadline().seconds(), 1);
  EXPECT_EQ(header.deadline().nanos(), 500'000'000);
  EXPECT_FALSE(header.has_ttl());
  EXPECT_EQ(service_.weights, weight_.data);
  request.request_id = "mine";
  ASSERT_TRUE(client_->Submit(request).ok());
  EXPECT_EQ(service_.created[2].request_id(), "mine");
}

TEST_F(JobClientTest, RejectsWeightsThatDoNotFitBeforeSending) {
  JobRequest request = Request();
  request.weight.data.remove_suffix(1);
  EXPECT_TRUE(absl::IsInvalidArgument(client_->Submit(request).status()));
  EXPECT_TRUE(service_.created.empty());
}

TEST_F(JobClientTest, ListsAllPagesWithTheFilter) {
  service_.pages.resize(3);
  service_.pages[0].add_jobs()->set_id("a");
  service_.pages[0].set_next_page_token("1");
  service_.pages[1].set_next_page_token("2");  // An empty page is no end.
  service_.pages[2].add_jobs()->set_id("b");
  const auto jobs =
      client_->List({.states = {v1::JOB_STATE_QUEUED}, .calibration_id = "c1", .page_size = 3});
  ASSERT_TRUE(jobs.ok()) << jobs.status();
  ASSERT_EQ(jobs->size(), 2);
  EXPECT_EQ(jobs->at(1).id(), "b");
  ASSERT_EQ(service_.listed.size(), 3);
  for (const v1::ListJobsRequest& request : service_.listed) {
    EXPECT_EQ(request.calibration_id(), "c1");
    EXPECT_EQ(request.states(0), v1::JOB_STATE_QUEUED);
    EXPECT_EQ(request.page_size(), 3);
  }
}

TEST_F(JobClientTest, AListThatNeverEndsIsRejected) {
  service_.pages.resize(2);
  service_.pages[0].set_next_page_token("1");
  service_.pages[1].set_next_page_token("1");
  EXPECT_EQ(client_->List().status().code(), absl::StatusCode::kInternal);
}

TEST_F(JobClientTest, WatchGoesOnUntilTheEnd) {
  ClientOptions options;
  options.retry.max_attempts = 1;
  const PatientClient<JobClient> client(server_.address(), options);
  service_.watches = {{{v1::JOB_STATE_QUEUED}, Unavailable()},
                      {{v1::JOB_STATE_QUEUED, v1::JOB_STATE_RUNNING}, Unavailable()},
                      {{}, Unavailable()},
                      {{v1::JOB_STATE_RUNNING, v1::JOB_STATE_FAILED}, grpc::Status::OK}};
  std::vector<v1::JobState> states;
  const auto job =
      client->Watch("j1", [&states](const v1::Job& now) { states.push_back(now.state()); });
  ASSERT_TRUE(job.ok()) << job.status();
  EXPECT_EQ(job->state(), v1::JOB_STATE_FAILED);
  EXPECT_EQ(states, (std::vector<v1::JobState>{v1::JOB_STATE_QUEUED, v1::JOB_STATE_QUEUED,
                                               v1::JOB_STATE_RUNNING, v1::JOB_STATE_RUNNING,
                                               v1::JOB_STATE_FAILED}));
  EXPECT_EQ(client.waits.size(), 3);
}

TEST_F(JobClientTest, AWatchThatEndsBeforeTheJobIsABrokenContract) {
  service_.watches = {{{v1::JOB_STATE_RUNNING}, grpc::Status::OK}};
  EXPECT_EQ(client_->Watch("j1").status().code(), absl::StatusCode::kInternal);
  EXPECT_TRUE(absl::IsNotFound(client_->Watch("j9").status()));
}

TEST_F(JobClientTest, ReadsAResult) {
  const auto result = client_->ReadResult("j1");
  ASSERT_TRUE(result.ok()) << result.status();
  ASSERT_EQ(result->tensors.size(), 2);
  EXPECT_EQ(result->tensors[0].data + result->tensors[1].data, service_.bytes);
  EXPECT_EQ(result->tensors[1].shape, (std::vector<int64_t>{3, 1}));
  EXPECT_EQ(result->certificate.row_bound_size(), 2);
}

// Broken before every run of 7 of the 60 bytes, and within the certificate.
class ResultBreakTest : public JobClientTest, public ::testing::WithParamInterface<int64_t> {};

TEST_P(ResultBreakTest, GoesOnFromTheByteItCameTo) {
  service_.on_run = [](int call, int64_t offset) -> FakeJobs::End {
    if (call > 1 || offset != GetParam()) return std::nullopt;
    return Unavailable();
  };
  const auto result = client_->ReadResult("j1");
  ASSERT_TRUE(result.ok()) << result.status();
  EXPECT_EQ(result->tensors[0].data + result->tensors[1].data, service_.bytes);
  // The certificate began anew.
  EXPECT_EQ(result->certificate.row_bound_size(), 2);
  EXPECT_EQ(service_.offsets, (std::vector<int64_t>{0, GetParam()}));
}

INSTANTIATE_TEST_SUITE_P(Offsets, ResultBreakTest,
                         ::testing::Values(0, 7, 14, 21, 28, 35, 42, 49, 56, 60));

TEST_F(JobClientTest, BrokenResultsAreRejected) {
  const auto code = [this](std::function<void(v1::ReadResultResponse*)> change) {
    service_.Wait();
    service_.change = std::move(change);
    return client_->ReadResult("j1").status().code();
  };
  using Frame = v1::ReadResultResponse;
  EXPECT_EQ(code([](Frame* f) {
              if (f->has_data()) f->mutable_data()->set_byte_offset(f->data().byte_offset() + 1);
            }),
            absl::StatusCode::kInternal);
  EXPECT_EQ(code([](Frame* f) {
              if (f->has_data()) f->mutable_data()->clear_data();
            }),
            absl::StatusCode::kInternal);
  EXPECT_EQ(code([](Frame* f) {
              if (f->has_data() && f->data().byte_offset() == 56) {
                f->mutable_data()->mutable_data()->append("more");
              }
            }),
            absl::StatusCode::kInternal);
  EXPECT_EQ(code([](Frame* f) {
              if (f->has_result()) f->mutable_result()->set_total_bytes(61);
            }),
            absl::StatusCode::kInternal);
  EXPECT_EQ(code([](Frame* f) {
              if (f->has_result()) f->mutable_result()->mutable_tensors(1)->set_shape(0, 1 << 30);
            }),
            absl::StatusCode::kInternal);
  EXPECT_EQ(code([](Frame* f) {
              if (f->has_certificate()) f->mutable_certificate()->set_rows(9);
            }),
            absl::StatusCode::kInternal);
}

TEST_F(JobClientTest, AnotherHeaderAfterABreakIsRejected) {
  service_.on_run = [](int call, int64_t offset) -> FakeJobs::End {
    if (call > 1 || offset < 14) return std::nullopt;
    return Unavailable();
  };
  int headers = 0;
  service_.change = [&headers](v1::ReadResultResponse* frame) {
    if (frame->has_result() && ++headers == 2) {
      frame->mutable_result()->mutable_tensors(0)->set_name("other");
    }
  };
  const absl::Status status = client_->ReadResult("j1").status();
  EXPECT_EQ(status.code(), absl::StatusCode::kInternal) << status;
  EXPECT_TRUE(Contains(status.message(), "header that came first"));
}

TEST_F(JobClientTest, ShortResultsAreDataLoss) {
  service_.bytes.resize(50);
  const absl::Status status = client_->ReadResult("j1").status();
  // The certificate comes too early.
  EXPECT_EQ(status.code(), absl::StatusCode::kInternal) << status;
  service_.Wait();
  service_.on_run = [](int, int64_t offset) -> FakeJobs::End {
    if (offset < 49) return std::nullopt;
    return grpc::Status::OK;
  };
  EXPECT_TRUE(absl::IsDataLoss(client_->ReadResult("j1").status()));
}

TEST_F(JobClientTest, ErrorsOfJobsCarryTheirDetails) {
  EXPECT_TRUE(JobError(service_.job).ok());
  service_.job.mutable_error()->set_code(9);
  service_.job.mutable_error()->set_message("every attempt failed");
  const auto job = client_->Get("j1");
  ASSERT_TRUE(job.ok());
  EXPECT_EQ(JobError(*job), absl::FailedPreconditionError("every attempt failed"));
}

}  // namespace
}  // namespace certiq
