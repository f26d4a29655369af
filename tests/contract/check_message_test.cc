// What holds for every message of a client.

#include "contract/check_message.h"

#include <gtest/gtest.h>

#include <string>

#include "base/status.h"
#include "certiq/v1/calibration_service.pb.h"
#include "certiq/v1/job_service.pb.h"
#include "certiq/v1/quantization_service.pb.h"

namespace certiq::server {
namespace {

std::string FieldAtFault(const google::protobuf::Message& message) {
  const absl::Status status = CheckMessage(message);
  EXPECT_EQ(status.ok(), !base::FieldOf(status).has_value()) << status;
  EXPECT_TRUE(status.ok() || absl::IsInvalidArgument(status)) << status;
  return base::FieldOf(status).value_or("");
}

// Adds a field that no contract has, of each wire type in turn.
void AddUnknown(google::protobuf::Message& message, int number, int wire_type) {
  auto& unknown = *message.GetReflection()->MutableUnknownFields(&message);
  if (wire_type == 0) unknown.AddVarint(number, 7);
  if (wire_type == 1) unknown.AddFixed64(number, 7);
  if (wire_type == 2) unknown.AddLengthDelimited(number, "seven");
  if (wire_type == 3) unknown.AddGroup(number)->AddVarint(1, 7);
  if (wire_type == 5) unknown.AddFixed32(number, 7);
}

TEST(CheckMessageTest, WhatTheContractHasIsFine) {
  v1::QuantizeRequest request;
  EXPECT_EQ(FieldAtFault(request), "");
  v1::QuantizeHeader& header = *request.mutable_header();
  header.set_request_id("r");
  header.mutable_spec()->mutable_damping()->mutable_held_out()->add_ladder(0.1);
  header.mutable_weight()->add_shape(4);
  EXPECT_EQ(FieldAtFault(request), "");
  // Rows are bytes, not text.
  request.mutable_weight()->set_data(std::string(size_t{1} << 20, 'x'));
  EXPECT_EQ(FieldAtFault(request), "");
}

TEST(CheckMessageTest, NoFieldIsIgnored) {
  for (const int wire_type : {0, 1, 2, 3, 5}) {
    v1::CreateJobRequest request;
    AddUnknown(request, 1000, wire_type);
    EXPECT_EQ(FieldAtFault(request), "1000");

    request.Clear();
    AddUnknown(*request.mutable_header(), 77, wire_type);
    EXPECT_EQ(FieldAtFault(request), "77");

    request.Clear();
    AddUnknown(*request.mutable_header()->mutable_spec(), 100, wire_type);
    EXPECT_EQ(FieldAtFault(request), "spec.100");

    request.Clear();
    AddUnknown(*request.mutable_header()->mutable_spec()->mutable_damping()->mutable_held_out(),
               100, wire_type);
    EXPECT_EQ(FieldAtFault(request), "spec.damping.held_out.100");
  }
  v1::GetJobRequest get;
  AddUnknown(get, 2, 2);
  const absl::Status status = CheckMessage(get);
  EXPECT_NE(status.message().find("field number 2 of certiq.v1.GetJobRequest"), std::string::npos)
      << status;
}

TEST(CheckMessageTest, TextsHaveALength) {
  const std::string longest(kMaxTextBytes, 'x');
  v1::GetJobRequest get;
  get.set_job_id(longest);
  EXPECT_EQ(FieldAtFault(get), "");
  get.set_job_id(longest + "x");
  EXPECT_EQ(FieldAtFault(get), "job_id");

  v1::FinalizeCalibrationRequest finalize;
  for (const char* id : {"a", "b"}) finalize.add_expected_stream_ids(id);
  finalize.add_expected_stream_ids(longest + "x");
  EXPECT_EQ(FieldAtFault(finalize), "expected_stream_ids");

  v1::QuantizeRequest quantize;
  quantize.mutable_header()->mutable_weight()->set_name(longest + "x");
  EXPECT_EQ(FieldAtFault(quantize), "weight.name");
}

}  // namespace
}  // namespace certiq::server
