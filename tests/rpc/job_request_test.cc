#include "job/job_request.h"

#include <gtest/gtest.h>

#include <cmath>
#include <functional>
#include <string>

#include "base/status.h"
#include "support/requests.h"
#include "support/text.h"

namespace certiq::server {
namespace {

v1::QuantizeHeader ValidHeader() {
  return testing::HeaderFor(testing::MakeRandomLayer(4, 8, 16)).header();
}

TEST(JobRequestTest, HeaderArrivesWhole) {
  v1::QuantizeHeader header = ValidHeader();
  header.mutable_spec()->set_bits(3);
  header.mutable_spec()->set_group_size(8);
  header.mutable_weight()->set_dtype(v1::DATA_TYPE_BF16);
  header.mutable_x()->set_dtype(v1::DATA_TYPE_U8);
  const auto job = ReadJobRequest(header);
  ASSERT_TRUE(job.ok()) << job.status();
  EXPECT_EQ(job->request_id, "test-request");
  EXPECT_EQ(job->layer_name, "model.layers.0.test");
  EXPECT_EQ(job->rows, 4);
  EXPECT_EQ(job->features, 8);
  EXPECT_EQ(job->weight_dtype, engine::DType::kBF16);
  ASSERT_TRUE(job->activations.has_value());
  EXPECT_EQ(job->activations->tokens, 16);
  EXPECT_EQ(job->activations->features, 8);
  EXPECT_EQ(job->activations->x_dtype, engine::DType::kU8);
  EXPECT_FALSE(job->activations->x_quantized_dtype.has_value());
  EXPECT_EQ(job->spec.bits, 3);
  EXPECT_EQ(job->spec.group_size, 8);
  EXPECT_EQ(job->spec_message.SerializeAsString(), header.spec().SerializeAsString());
  EXPECT_EQ(job->calibration_id, "");
  // Such a job is not stored, and nothing of it is compared with another.
  EXPECT_FALSE(job->stored);
  EXPECT_EQ(job->digest, "");
  EXPECT_EQ(job->deadline_micros, 0);
}

struct BadHeader {
  const char* field;
  const char* text;
  std::function<void(v1::QuantizeHeader&)> change;
  absl::StatusCode code = absl::StatusCode::kInvalidArgument;
};

void PrintTo(const BadHeader& bad, std::ostream* out) { *out << bad.field << " " << bad.text; }

class BadHeaderTest : public ::testing::TestWithParam<BadHeader> {};

TEST_P(BadHeaderTest, NamesTheField) {
  v1::QuantizeHeader header = ValidHeader();
  GetParam().change(header);
  const absl::Status status = ReadJobRequest(header).status();
  EXPECT_EQ(status.code(), GetParam().code) << status;
  EXPECT_EQ(base::FieldOf(status).value_or("(none)"), GetParam().field);
  EXPECT_CONTAINS(status.message(), GetParam().text);
}

template <typename Enum>
constexpr Enum kUnknown = static_cast<Enum>(99);

INSTANTIATE_TEST_SUITE_P(
    Enums, BadHeaderTest,
    ::testing::Values(
        BadHeader{"spec.method", "got METHOD_UNSPECIFIED",
                  [](auto& h) { h.mutable_spec()->set_method(v1::METHOD_UNSPECIFIED); }},
        BadHeader{"spec.method", "unknown number 99",
                  [](auto& h) { h.mutable_spec()->set_method(kUnknown<v1::Method>); }},
        BadHeader{"spec.scale_dtype", "unknown number 99",
                  [](auto& h) { h.mutable_spec()->set_scale_dtype(kUnknown<v1::DataType>); }},
        BadHeader{"spec.group_scales", "GROUP_SCALES_STATIC",
                  [](auto& h) { h.mutable_spec()->set_group_scales(kUnknown<v1::GroupScales>); }},
        BadHeader{"spec.scale", "SCALE_RULE_ABSMAX",
                  [](auto& h) { h.mutable_spec()->set_scale(kUnknown<v1::ScaleRule>); }},
        BadHeader{"spec.rounding", "ROUNDING_NEAREST",
                  [](auto& h) { h.mutable_spec()->set_rounding(kUnknown<v1::Rounding>); }},
        BadHeader{"spec.order", "ORDER_NATURAL",
                  [](auto& h) { h.mutable_spec()->set_order(kUnknown<v1::Order>); }},
        BadHeader{"spec.format", "FORMAT_GPTQ",
                  [](auto& h) { h.mutable_spec()->set_format(kUnknown<v1::Format>); }},
        BadHeader{"spec.quality", "QUALITY_BEST",
                  [](auto& h) { h.mutable_spec()->set_quality(kUnknown<v1::Quality>); }},
        BadHeader{"spec.damping.on_failure", "ON_FAILURE_FAIL",
                  [](auto& h) {
                    h.mutable_spec()->mutable_damping()->set_on_failure(kUnknown<v1::OnFailure>);
                  }},
        BadHeader{"weight.dtype", "got DATA_TYPE_UNSPECIFIED",
                  [](auto& h) { h.mutable_weight()->clear_dtype(); }},
        BadHeader{"x.dtype", "unknown number 99",
                  [](auto& h) { h.mutable_x()->set_dtype(kUnknown<v1::DataType>); }}));

INSTANTIATE_TEST_SUITE_P(
    Values, BadHeaderTest,
    ::testing::Values(
        BadHeader{"spec.bits", "got 1", [](auto& h) { h.mutable_spec()->set_bits(1); }},
        BadHeader{"spec.bits", "got 9", [](auto& h) { h.mutable_spec()->set_bits(9); }},
        BadHeader{"spec.group_size", "got 7", [](auto& h) { h.mutable_spec()->set_group_size(7); }},
        BadHeader{"spec.group_size", "got -1",
                  [](auto& h) { h.mutable_spec()->set_group_size(-1); }},
        BadHeader{"spec.damping.absolute", "got -1",
                  [](auto& h) { h.mutable_spec()->mutable_damping()->set_absolute(-1); }},
        BadHeader{
            "spec.damping.relative_trace", "nan",
            [](auto& h) { h.mutable_spec()->mutable_damping()->set_relative_trace(std::nan("")); }},
        BadHeader{"request_id", "at most 128",
                  [](auto& h) { h.set_request_id(std::string(129, 'x')); }},
        BadHeader{"layer_name", "at most 256",
                  [](auto& h) { h.set_layer_name(std::string(257, 'x')); }},
        BadHeader{"weight.name", "at most 256",
                  [](auto& h) { h.mutable_weight()->set_name(std::string(257, 'x')); }},
        BadHeader{"x.name", "at most 256",
                  [](auto& h) { h.mutable_x()->set_name(std::string(257, 'x')); }},
        BadHeader{"weight", "got none", [](auto& h) { h.clear_weight(); }},
        BadHeader{"x", "got none", [](auto& h) { h.clear_x(); }},
        BadHeader{"weight.shape", "got 1",
                  [](auto& h) { h.mutable_weight()->mutable_shape()->RemoveLast(); }},
        BadHeader{"x.shape", "got 3", [](auto& h) { h.mutable_x()->add_shape(1); }},
        BadHeader{"held_out_fraction", "got 0.6", [](auto& h) { h.set_held_out_fraction(0.6); }},
        BadHeader{"held_out_fraction", "got nan",
                  [](auto& h) { h.set_held_out_fraction(std::nan("")); }},
        BadHeader{"sequence_rows", "got -1", [](auto& h) { h.set_sequence_rows(-1); }},
        BadHeader{"calibration_id", "either a calibration",
                  [](auto& h) { h.set_calibration_id("c"); }}));

TEST(JobRequestTest, NoHeldOutShareIsFine) {
  v1::QuantizeHeader header = ValidHeader();
  header.set_held_out_fraction(0);
  header.set_sequence_rows(128);
  EXPECT_TRUE(ReadJobRequest(header).ok());
}

TEST(JobRequestTest, MismatchedInputsAndHeldOutRowsArrive) {
  v1::QuantizeHeader header = ValidHeader();
  *header.mutable_x_quantized() = header.x();
  header.mutable_x_quantized()->set_dtype(v1::DATA_TYPE_BF16);
  header.set_held_out_fraction(0.25);
  header.set_sequence_rows(128);
  const auto job = ReadJobRequest(header);
  ASSERT_TRUE(job.ok()) << job.status();
  const Activations& x = *job->activations;
  EXPECT_EQ(x.x_quantized_dtype, engine::DType::kBF16);
  EXPECT_EQ(x.quantized_tokens, x.tokens);
  EXPECT_EQ(x.quantized_features, x.features);
  EXPECT_EQ(x.held_out_fraction, 0.25);
  EXPECT_EQ(x.sequence_rows, 128);
}

TEST(JobRequestTest, HeldOutDampingHoldsOutAnEighthByDefault) {
  v1::QuantizeHeader header = ValidHeader();
  EXPECT_EQ(ReadJobRequest(header)->activations->held_out_fraction, 0);
  header.mutable_spec()->mutable_damping()->mutable_held_out();
  EXPECT_EQ(ReadJobRequest(header)->activations->held_out_fraction, 0.125);
  header.set_held_out_fraction(0);
  EXPECT_EQ(ReadJobRequest(header)->activations->held_out_fraction, 0) << "what is said is kept";
}

TEST(JobRequestTest, ACalibrationTakesThePlaceOfActivations) {
  v1::QuantizeHeader header = ValidHeader();
  header.clear_x();
  header.set_calibration_id("c");
  const auto job = ReadJobRequest(header);
  ASSERT_TRUE(job.ok()) << job.status();
  EXPECT_EQ(job->calibration_id, "c");
  EXPECT_FALSE(job->activations.has_value());
  for (const auto& change : std::vector<std::function<void(v1::QuantizeHeader&)>>{
           [](auto& h) { *h.mutable_x_quantized() = ValidHeader().x(); },
           [](auto& h) { h.set_held_out_fraction(0); }, [](auto& h) { h.set_sequence_rows(1); }}) {
    v1::QuantizeHeader both = header;
    change(both);
    EXPECT_EQ(base::FieldOf(ReadJobRequest(both).status()), "calibration_id");
  }
}

v1::CreateJobHeader ValidJobHeader() {
  v1::CreateJobHeader header;
  header.set_request_id("test-request");
  header.set_layer_name("model.layers.0.test");
  header.set_calibration_id("calibration-1");
  *header.mutable_weight() = ValidHeader().weight();
  return header;
}

TEST(StoredJobRequestTest, HeaderArrivesWhole) {
  v1::CreateJobHeader header = ValidJobHeader();
  header.set_priority(-7);
  header.mutable_deadline()->set_seconds(2);
  header.mutable_deadline()->set_nanos(500'000'000);
  header.mutable_ttl()->set_seconds(60);
  header.mutable_spec()->set_bits(3);
  const auto job = ReadJobRequest(header);
  ASSERT_TRUE(job.ok()) << job.status();
  EXPECT_TRUE(job->stored);
  EXPECT_EQ(job->request_id, "test-request");
  EXPECT_EQ(job->layer_name, "model.layers.0.test");
  EXPECT_EQ(job->calibration_id, "calibration-1");
  EXPECT_FALSE(job->activations.has_value());
  EXPECT_EQ(job->rows, 4);
  EXPECT_EQ(job->features, 8);
  EXPECT_EQ(job->priority, -7);
  EXPECT_EQ(job->deadline_micros, 2'500'000);
  EXPECT_EQ(job->ttl_micros, 60'000'000);
  EXPECT_EQ(job->spec.bits, 3);
  EXPECT_EQ(job->spec_message.bits(), 3);
}

TEST(StoredJobRequestTest, WhatIsNotSaidHasDefaults) {
  const auto job = ReadJobRequest(ValidJobHeader());
  ASSERT_TRUE(job.ok()) << job.status();
  EXPECT_EQ(job->priority, 0);
  EXPECT_EQ(job->deadline_micros, 0);
  EXPECT_EQ(job->ttl_micros, kDefaultTtlMicros);
}

TEST(StoredJobRequestTest, TheDigestIsOfTheWholeHeader) {
  const v1::CreateJobHeader header = ValidJobHeader();
  const std::string digest = ReadJobRequest(header)->digest;
  EXPECT_EQ(digest.size(), 64U);
  EXPECT_EQ(ReadJobRequest(header)->digest, digest);
  for (const auto& change : std::vector<std::function<void(v1::CreateJobHeader&)>>{
           [](auto& h) { h.set_layer_name("other"); }, [](auto& h) { h.set_priority(1); },
           [](auto& h) { h.mutable_spec()->set_seed(1); },
           [](auto& h) { h.mutable_ttl()->set_seconds(60); }}) {
    v1::CreateJobHeader other = header;
    change(other);
    EXPECT_NE(ReadJobRequest(other)->digest, digest);
  }
}

TEST(StoredJobRequestTest, BadValuesAreNamed) {
  struct Bad {
    const char* field;
    const char* text;
    std::function<void(v1::CreateJobHeader&)> change;
  };
  for (const Bad& bad : {
           Bad{"calibration_id", "expected a calibration, got none",
               [](auto& h) { h.clear_calibration_id(); }},
           Bad{"request_id", "at most 128",
               [](auto& h) { h.set_request_id(std::string(129, 'x')); }},
           Bad{"layer_name", "at most 256",
               [](auto& h) { h.set_layer_name(std::string(257, 'x')); }},
           Bad{"weight", "got none", [](auto& h) { h.clear_weight(); }},
           Bad{"weight.shape", "got 1",
               [](auto& h) {
                 h.mutable_weight()->clear_shape();
                 h.mutable_weight()->add_shape(4);
               }},
           Bad{"spec.bits", "got 9", [](auto& h) { h.mutable_spec()->set_bits(9); }},
           Bad{"deadline", "got 0 s and 0 ns", [](auto& h) { h.mutable_deadline(); }},
           Bad{"deadline", "got -1 s", [](auto& h) { h.mutable_deadline()->set_seconds(-1); }},
           Bad{"deadline", "365 days",
               [](auto& h) { h.mutable_deadline()->set_seconds(INT64_MAX); }},
           Bad{"deadline", "ns", [](auto& h) { h.mutable_deadline()->set_nanos(INT32_MIN); }},
           Bad{"ttl", "expected 1 seconds", [](auto& h) { h.mutable_ttl()->set_nanos(1000); }},
       }) {
    v1::CreateJobHeader header = ValidJobHeader();
    bad.change(header);
    const absl::Status status = ReadJobRequest(header).status();
    EXPECT_TRUE(absl::IsInvalidArgument(status)) << status;
    EXPECT_EQ(base::FieldOf(status).value_or("(none)"), bad.field);
    EXPECT_CONTAINS(status.message(), bad.text);
  }
}

}  // namespace
}  // namespace certiq::server
