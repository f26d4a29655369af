// Refusals of messages that are none, come too early, twice or not at all, by every RPC.

#include "rpc/calls/messages.h"

#include <gtest/gtest.h>

#include <functional>
#include <future>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "certiq/v1/calibration_service.grpc.pb.h"
#include "certiq/v1/job_service.grpc.pb.h"
#include "support/requests.h"
#include "support/text.h"
#include "test_server.h"

namespace certiq::testing {
namespace {

using grpc::StatusCode;

constexpr int64_t kFeatures = 8;

// A call whose client streams.
struct Upload {
  const char* method;
  std::function<std::string(const std::string& calibration)> header;
  // A message that is no header, and its name in refusals.
  std::string body;
  const char* body_name;
  // The refusal of an empty message behind the header.
  const char* empty_field;
  const char* empty_text;
};

std::vector<Upload> Uploads() {
  const Layer layer = MakeRandomLayer(4, kFeatures, 16);
  v1::AccumulateRequest rows;
  rows.mutable_chunk()->set_x(std::string(kFeatures * 4, '\0'));
  v1::ImportStatisticsRequest sums;
  sums.set_data("x");
  v1::CreateJobRequest weight;
  *weight.mutable_weight() = WeightChunk(layer, 0, 4).weight();
  return {
      {"QuantizationService/Quantize",
       [layer](const std::string& /*calibration*/) { return HeaderFor(layer).SerializeAsString(); },
       WeightChunk(layer, 0, 4).SerializeAsString(), "weight", "payload",
       "expected weight or activation, got none"},
      {"JobService/CreateJob",
       [layer](const std::string& calibration) {
         v1::CreateJobRequest request;
         request.mutable_header()->set_calibration_id(calibration);
         *request.mutable_header()->mutable_weight() = HeaderFor(layer).header().weight();
         return request.SerializeAsString();
       },
       weight.SerializeAsString(), "weight", "payload", "expected weight, got none"},
      {"CalibrationService/Accumulate",
       [](const std::string& calibration) {
         v1::AccumulateRequest request;
         request.mutable_header()->set_calibration_id(calibration);
         request.mutable_header()->set_stream_id("rows");
         request.mutable_header()->set_x(v1::DATA_TYPE_F32);
         return request.SerializeAsString();
       },
       rows.SerializeAsString(), "chunk", "header",
       "expected as the first message, and only there"},
      {"CalibrationService/ImportStatistics",
       [](const std::string& calibration) {
         v1::ImportStatisticsRequest request;
         request.mutable_header()->set_calibration_id(calibration);
         request.mutable_header()->set_stream_id("sums");
         request.mutable_header()->set_tokens(1);
         request.mutable_header()->set_dtype(v1::DATA_TYPE_F64);
         return request.SerializeAsString();
       },
       sums.SerializeAsString(), "data", "header",
       "expected as the first message, and only there"}};
}

// It has an open calibration, and a finalized one for jobs.
class MessagesTest : public ::testing::Test {
 protected:
  MessagesTest() : open_(Create("open")), finalized_(Create("finalized")) {
    const Layer layer = MakeRandomLayer(4, kFeatures, 16);
    grpc::ClientContext context;
    const auto stream = calibrations_->Accumulate(&context);
    v1::AccumulateRequest request;
    request.mutable_header()->set_calibration_id(finalized_);
    request.mutable_header()->set_stream_id("rows");
    request.mutable_header()->set_x(v1::DATA_TYPE_F32);
    stream->Write(request);
    request.mutable_chunk()->set_x(ActivationChunk(layer, 0, 16).activation().x());
    stream->Write(request);
    stream->WritesDone();
    v1::AccumulateResponse response;
    while (stream->Read(&response)) {
    }
    EXPECT_TRUE(stream->Finish().ok());
    grpc::ClientContext finalizing;
    v1::FinalizeCalibrationRequest finalize;
    finalize.set_calibration_id(finalized_);
    v1::Calibration calibration;
    EXPECT_TRUE(calibrations_->FinalizeCalibration(&finalizing, finalize, &calibration).ok());
  }
  ~MessagesTest() override {
    for (const std::string& id : {open_, finalized_}) {
      if (!server_.server->health().ok()) break;
      grpc::ClientContext context;
      v1::DeleteCalibrationRequest request;
      request.set_calibration_id(id);
      google::protobuf::Empty nothing;
      EXPECT_TRUE(calibrations_->DeleteCalibration(&context, request, &nothing).ok());
    }
    EXPECT_TRUE(server_.Idle());
  }

  std::string Create(const std::string& label) {
    grpc::ClientContext context;
    v1::CreateCalibrationRequest request;
    request.set_features(kFeatures);
    request.add_labels(label);
    v1::Calibration calibration;
    EXPECT_TRUE(calibrations_->CreateCalibration(&context, request, &calibration).ok());
    return calibration.id();
  }
  // The header of an upload that is admitted.
  std::string HeaderOf(const Upload& upload) const {
    return upload.header(std::string(upload.method) == "JobService/CreateJob" ? finalized_ : open_);
  }
  void ExpectRefused(const Upload& upload, const std::vector<std::string>& messages,
                     const char* field, const std::string& text) {
    const grpc::Status status = SendRaw(server_, upload.method, messages);
    EXPECT_EQ(status.error_code(), StatusCode::INVALID_ARGUMENT) << upload.method;
    EXPECT_EQ(DetailsOf(status).field(), field) << upload.method;
    EXPECT_CONTAINS(status.error_message(), text);
  }

  TestServer server_;
  const std::shared_ptr<grpc::Channel> channel_ = server_.NewChannel();
  const std::unique_ptr<v1::CalibrationService::Stub> calibrations_ =
      v1::CalibrationService::NewStub(channel_);
  const std::unique_ptr<v1::JobService::Stub> jobs_ = v1::JobService::NewStub(channel_);
  const std::string open_;
  const std::string finalized_;
};

TEST_F(MessagesTest, AnEmptyStreamHasNoHeader) {
  for (const Upload& upload : Uploads()) {
    ExpectRefused(upload, {}, "header",
                  "header: expected as the first message, the stream ended without one");
  }
}

TEST_F(MessagesTest, TheHeaderComesFirst) {
  for (const Upload& upload : Uploads()) {
    ExpectRefused(upload, {upload.body}, "header",
                  absl::StrCat("header: expected as the first message, got ", upload.body_name));
    ExpectRefused(upload, {""}, "header", "header: expected as the first message, got none");
  }
}

TEST_F(MessagesTest, TheHeaderComesOnce) {
  for (const Upload& upload : Uploads()) {
    ExpectRefused(upload, {HeaderOf(upload), HeaderOf(upload)}, "header",
                  "header: expected as the first message, and only there");
  }
}

TEST_F(MessagesTest, AnEmptyMessageIsNoPiece) {
  for (const Upload& upload : Uploads()) {
    ExpectRefused(upload, {HeaderOf(upload), ""}, upload.empty_field, upload.empty_text);
  }
}

TEST_F(MessagesTest, BytesThatAreNoMessage) {
  const std::string garbage = "\xff\xff\xff\xff";
  for (const Upload& upload : Uploads()) {
    ExpectRefused(upload, {garbage}, "payload", "got 4 bytes that do not parse as one");
    ExpectRefused(upload, {HeaderOf(upload), garbage}, "payload",
                  "got 4 bytes that do not parse as one");
  }
  for (const auto& [method, message] :
       {std::pair("CalibrationService/CreateCalibration", "CreateCalibrationRequest"),
        std::pair("CalibrationService/ExportStatistics", "an ExportStatisticsRequest"),
        std::pair("CalibrationService/FinalizeCalibration", "FinalizeCalibrationRequest"),
        std::pair("CalibrationService/GetCalibration", "GetCalibrationRequest"),
        std::pair("CalibrationService/ListCalibrations", "ListCalibrationsRequest"),
        std::pair("CalibrationService/DeleteCalibration", "DeleteCalibrationRequest"),
        std::pair("JobService/GetJob", "GetJobRequest"),
        std::pair("JobService/ListJobs", "ListJobsRequest"),
        std::pair("JobService/CancelJob", "CancelJobRequest"),
        std::pair("JobService/DeleteJob", "DeleteJobRequest"),
        std::pair("JobService/WatchJob", "a WatchJobRequest"),
        std::pair("JobService/ReadResult", "a ReadResultRequest")}) {
    const grpc::Status status = SendRaw(server_, method, {garbage});
    EXPECT_EQ(status.error_code(), StatusCode::INVALID_ARGUMENT) << method;
    EXPECT_EQ(DetailsOf(status).field(), "payload") << method;
    EXPECT_CONTAINS(status.error_message(),
                    absl::StrCat("expected ", message, ", got 4 bytes that do not parse as one"));
  }
}

// A client that sends its header and nothing more takes from others no more than its header asked
// for, and when it leaves it gives that back.
TEST_F(MessagesTest, SilenceAfterTheHeader) {
  grpc::ClientContext creating;
  v1::Job job;
  const auto create = jobs_->CreateJob(&creating, &job);
  grpc::ClientContext accumulating;
  const auto accumulate = calibrations_->Accumulate(&accumulating);
  grpc::ClientContext importing;
  v1::ImportStatisticsResponse imported;
  const auto import = calibrations_->ImportStatistics(&importing, &imported);
  const std::vector<Upload> uploads = Uploads();
  Call quantize(server_);
  const int64_t before = server_.budget.reserved();
  int64_t reserved = before;
  // Each holds what its header asked for.
  const auto grows = [&] {
    if (!TestServer::Eventually([&] { return server_.budget.reserved() > reserved; })) return false;
    reserved = server_.budget.reserved();
    return true;
  };
  v1::QuantizeRequest quantize_header;
  quantize_header.ParseFromString(HeaderOf(uploads[0]));
  quantize.Send(quantize_header);
  EXPECT_TRUE(quantize.ReadUntil(v1::PHASE_RECEIVE));
  EXPECT_TRUE(grows());
  v1::CreateJobRequest create_header;
  create_header.ParseFromString(HeaderOf(uploads[1]));
  create->Write(create_header);
  EXPECT_TRUE(grows());
  v1::AccumulateRequest accumulate_header;
  accumulate_header.ParseFromString(HeaderOf(uploads[2]));
  accumulate->Write(accumulate_header);
  v1::AccumulateResponse position;
  EXPECT_TRUE(accumulate->Read(&position));
  EXPECT_EQ(position.progress().received(), 0);
  EXPECT_TRUE(grows());
  v1::ImportStatisticsRequest import_header;
  import_header.ParseFromString(HeaderOf(uploads[3]));
  import->Write(import_header);
  EXPECT_TRUE(grows());
  EXPECT_TRUE(Quantize(server_, QuantizeRequestsFor(MakeRandomLayer(4, 8, 16))).status.ok());
  creating.TryCancel();
  accumulating.TryCancel();
  importing.TryCancel();
  quantize.Cancel();
  EXPECT_EQ(create->Finish().error_code(), StatusCode::CANCELLED);
  EXPECT_EQ(accumulate->Finish().error_code(), StatusCode::CANCELLED);
  EXPECT_EQ(import->Finish().error_code(), StatusCode::CANCELLED);
  EXPECT_EQ(quantize.Finish().status.error_code(), StatusCode::CANCELLED);
  // The calibration remembers the stream that was opened.
  constexpr int64_t kOneStream = 1024;
  EXPECT_TRUE(
      TestServer::Eventually([&] { return server_.budget.reserved() <= before + kOneStream; }));
}

// New work is refused with a delay, after which another server may take it; calls that only look
// are answered until the end.
TEST_F(MessagesTest, NewCallsWhileTheServerDrains) {
  // One that was admitted keeps the server up.
  Call admitted(server_);
  const Layer layer = MakeRandomLayer(4, kFeatures, 16);
  admitted.Send(HeaderFor(layer));
  ASSERT_TRUE(admitted.ReadUntil(v1::PHASE_RECEIVE));
  // The first has said nothing yet, the second goes on with the next server.
  grpc::ClientContext creating;
  v1::Job job;
  const auto create = jobs_->CreateJob(&creating, &job);
  grpc::ClientContext accumulating;
  const auto accumulate = calibrations_->Accumulate(&accumulating);
  v1::AccumulateRequest header;
  header.ParseFromString(HeaderOf(Uploads()[2]));
  accumulate->Write(header);
  v1::AccumulateResponse position;
  EXPECT_TRUE(accumulate->Read(&position));

  auto drained = std::async(std::launch::async, [&] { return server_.server->Drain(kPatience); });
  ASSERT_TRUE(TestServer::Eventually([&] { return !server_.server->health().ok(); }));
  for (const grpc::Status& status : {create->Finish(), accumulate->Finish()}) {
    EXPECT_EQ(status.error_code(), StatusCode::UNAVAILABLE);
    EXPECT_EQ(DetailsOf(status).retry.retry_delay().seconds(), 1);
  }
  std::vector<std::pair<std::string, std::string>> refused;
  for (const Upload& upload : Uploads()) refused.emplace_back(upload.method, HeaderOf(upload));
  v1::CreateCalibrationRequest wanted;
  wanted.set_features(kFeatures);
  refused.emplace_back("CalibrationService/CreateCalibration", wanted.SerializeAsString());
  refused.emplace_back("JobService/WatchJob", "");
  for (const auto& [method, message] : refused) {
    const grpc::Status status = SendRaw(server_, method, {message});
    EXPECT_EQ(status.error_code(), StatusCode::UNAVAILABLE) << method;
    EXPECT_EQ(DetailsOf(status).retry.retry_delay().seconds(), 1) << method;
    EXPECT_CONTAINS(status.error_message(), "draining");
  }
  for (const char* method : {"CalibrationService/ListCalibrations", "JobService/ListJobs"}) {
    EXPECT_TRUE(SendRaw(server_, method, {""}).ok()) << method;
  }
  v1::GetCalibrationRequest get;
  get.set_calibration_id(open_);
  EXPECT_TRUE(
      SendRaw(server_, "CalibrationService/GetCalibration", {get.SerializeAsString()}).ok());
  // Here, since the fixture comes when the server has ended.
  for (const std::string& id : {open_, finalized_}) {
    v1::DeleteCalibrationRequest remove;
    remove.set_calibration_id(id);
    EXPECT_TRUE(
        SendRaw(server_, "CalibrationService/DeleteCalibration", {remove.SerializeAsString()})
            .ok());
  }
  admitted.Send(WeightChunk(layer, 0, 4));
  admitted.Send(ActivationChunk(layer, 0, 16));
  EXPECT_TRUE(admitted.Finish().status.ok());
  EXPECT_TRUE(drained.get());
}

}  // namespace
}  // namespace certiq::testing
