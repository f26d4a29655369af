#include "contract/convert.h"

#include <gtest/gtest.h>

#include <cmath>
#include <functional>
#include <string>
#include <vector>

#include "base/status.h"
#include "support/requests.h"
#include "support/text.h"

namespace certiq::server {
namespace {

v1::QuantizeHeader ValidHeader() {
  return testing::HeaderFor(testing::MakeRandomLayer(4, 8, 16)).header();
}

TEST(ConvertTest, HeaderArrivesWhole) {
  v1::QuantizeHeader header = ValidHeader();
  header.mutable_spec()->set_bits(3);
  header.mutable_spec()->set_group_size(8);
  header.mutable_weight()->set_dtype(v1::DATA_TYPE_BF16);
  header.mutable_x()->set_dtype(v1::DATA_TYPE_U8);
  const auto call = FromProto(header);
  ASSERT_TRUE(call.ok()) << call.status();
  EXPECT_EQ(call->request_id, "test-request");
  EXPECT_EQ(call->layer_name, "model.layers.0.test");
  EXPECT_EQ(call->layer.rows, 4);
  EXPECT_EQ(call->layer.features, 8);
  EXPECT_EQ(call->layer.tokens, 16);
  EXPECT_EQ(call->layer.x_features, 8);
  EXPECT_EQ(call->layer.weight_dtype, engine::DType::kBF16);
  EXPECT_EQ(call->layer.x_dtype, engine::DType::kU8);
  EXPECT_EQ(call->layer.spec.bits, 3);
  EXPECT_EQ(call->layer.spec.group_size, 8);
}

TEST(ConvertTest, SpecKeepsPresence) {
  const auto empty = FromProto(v1::QuantizationSpec());
  ASSERT_TRUE(empty.ok());
  EXPECT_FALSE(empty->method || empty->bits || empty->symmetric || empty->group_size ||
               empty->scale_dtype || empty->grid || empty->group_scales || empty->scale ||
               empty->scale_trials || empty->signed_scales || empty->polish || empty->rounding ||
               empty->seed || empty->order || empty->damping_rule || empty->damping_value ||
               empty->max_attempts || empty->damping_factor || empty->on_failure || empty->format ||
               empty->quality || empty->per_row || empty->failure_probability ||
               empty->compare_nearest);
}

TEST(ConvertTest, SpecArrivesWhole) {
  v1::QuantizationSpec spec;
  spec.set_method(v1::METHOD_QRONOS);
  spec.set_bits(0);
  spec.set_symmetric(false);
  spec.set_group_size(0);
  spec.set_scale_dtype(v1::DATA_TYPE_F16);
  spec.mutable_grid()->add_scales(0.5F);
  spec.mutable_grid()->add_zero_points(8);
  spec.mutable_grid()->set_lowest_code(1);
  spec.set_group_scales(v1::GROUP_SCALES_DYNAMIC);
  spec.set_scale(v1::SCALE_RULE_PISO);
  spec.set_scale_objective(v1::SCALE_OBJECTIVE_DATA_FREE);
  spec.set_scale_passes(0);
  spec.set_scale_trials(3);
  spec.set_signed_scales(false);
  spec.set_polish(2);
  spec.set_rounding(v1::ROUNDING_STOCHASTIC);
  spec.set_seed(~uint64_t{0});
  spec.set_order(v1::ORDER_DECREASING_NORM);
  spec.mutable_damping()->mutable_held_out()->add_ladder(0.25);
  spec.mutable_damping()->mutable_held_out()->set_climb(true);
  spec.mutable_damping()->set_max_attempts(7);
  spec.mutable_damping()->set_factor(3);
  spec.mutable_damping()->set_on_failure(v1::ON_FAILURE_NEAREST);
  spec.set_format(v1::FORMAT_GPTQ_V2);
  spec.set_quality(v1::QUALITY_BEST);
  spec.mutable_certificate()->set_per_row(false);
  spec.mutable_certificate()->set_failure_probability(0.5);
  spec.mutable_certificate()->set_compare_nearest(true);
  const auto out = FromProto(spec);
  ASSERT_TRUE(out.ok()) << out.status();
  EXPECT_EQ(out->method, engine::Method::kQronos);
  EXPECT_EQ(out->bits, 0);
  EXPECT_EQ(out->symmetric, false);
  EXPECT_EQ(out->group_size, 0);
  EXPECT_EQ(out->scale_dtype, engine::DType::kF16);
  ASSERT_TRUE(out->grid.has_value());
  EXPECT_EQ(out->grid->scales, std::vector{0.5F});
  EXPECT_EQ(out->grid->zero_points, std::vector{8});
  EXPECT_EQ(out->grid->lowest_code, 1);
  EXPECT_FALSE(out->grid->highest_code.has_value());
  EXPECT_EQ(out->group_scales, engine::GroupScales::kDynamic);
  EXPECT_EQ(out->scale, engine::ScaleRule::kPiso);
  EXPECT_EQ(out->scale_objective, engine::ScaleObjective::kDataFree);
  EXPECT_EQ(out->scale_passes, 0);
  EXPECT_EQ(out->scale_trials, 3);
  EXPECT_EQ(out->signed_scales, false);
  EXPECT_EQ(out->polish, 2);
  EXPECT_EQ(out->rounding, engine::Rounding::kStochastic);
  EXPECT_EQ(out->seed, ~uint64_t{0});
  EXPECT_EQ(out->order, engine::Order::kDecreasingNorm);
  EXPECT_EQ(out->damping_rule, engine::DampingRule::kHeldOut);
  EXPECT_EQ(out->damping_ladder, std::vector{0.25});
  EXPECT_EQ(out->damping_climb, true);
  EXPECT_EQ(out->max_attempts, 7);
  EXPECT_EQ(out->damping_factor, 3);
  EXPECT_EQ(out->on_failure, engine::OnFailure::kNearest);
  EXPECT_EQ(out->format, engine::Format::kGptqV2);
  EXPECT_EQ(out->quality, engine::Quality::kBest);
  EXPECT_EQ(out->per_row, false);
  EXPECT_EQ(out->failure_probability, 0.5);
  EXPECT_EQ(out->compare_nearest, true);
}

TEST(ConvertTest, DampingRules) {
  v1::QuantizationSpec spec;
  spec.mutable_damping()->set_relative_trace(0.5);
  EXPECT_EQ(FromProto(spec)->damping_rule, engine::DampingRule::kRelativeTrace);
  spec.mutable_damping()->set_absolute(0);
  EXPECT_EQ(FromProto(spec)->damping_rule, engine::DampingRule::kAbsolute);
  EXPECT_EQ(FromProto(spec)->damping_value, 0.0);
  spec.mutable_damping()->set_relative_sigma_max(1e-6);
  EXPECT_EQ(FromProto(spec)->damping_rule, engine::DampingRule::kRelativeSigmaMax);
  spec.mutable_damping()->clear_rule();
  EXPECT_EQ(FromProto(spec)->damping_rule, std::nullopt);
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
  const absl::Status status = FromProto(header).status();
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

TEST(ConvertTest, NoHeldOutShareIsFine) {
  v1::QuantizeHeader header = ValidHeader();
  header.set_held_out_fraction(0);
  header.set_sequence_rows(128);
  EXPECT_TRUE(FromProto(header).ok());
}

TEST(ConvertTest, MismatchedInputsAndHeldOutRowsArrive) {
  v1::QuantizeHeader header = ValidHeader();
  *header.mutable_x_quantized() = header.x();
  header.mutable_x_quantized()->set_dtype(v1::DATA_TYPE_BF16);
  header.set_held_out_fraction(0.25);
  header.set_sequence_rows(128);
  const auto call = FromProto(header);
  ASSERT_TRUE(call.ok()) << call.status();
  EXPECT_EQ(call->layer.x_quantized_dtype, engine::DType::kBF16);
  EXPECT_EQ(call->layer.x_quantized_tokens, call->layer.tokens);
  EXPECT_EQ(call->layer.x_quantized_features, call->layer.x_features);
  EXPECT_EQ(call->layer.held_out_fraction, 0.25);
  EXPECT_EQ(call->layer.sequence_rows, 128);
}

TEST(ConvertTest, HeldOutDampingHoldsOutAnEighthByDefault) {
  v1::QuantizeHeader header = ValidHeader();
  EXPECT_EQ(FromProto(header)->layer.held_out_fraction, 0);
  header.mutable_spec()->mutable_damping()->mutable_held_out();
  EXPECT_EQ(FromProto(header)->layer.held_out_fraction, 0.125);
  header.set_held_out_fraction(0);
  EXPECT_EQ(FromProto(header)->layer.held_out_fraction, 0) << "what is said is kept";
}

// The settings as decided come back in the certificate as they could be sent.
TEST(ConvertTest, CertificateEchoesTheSpec) {
  v1::QuantizationSpec spec;
  spec.set_method(v1::METHOD_QRONOS);
  spec.set_bits(3);
  spec.set_symmetric(false);
  spec.set_group_size(32);
  spec.set_group_scales(v1::GROUP_SCALES_DYNAMIC);
  spec.set_scale(v1::SCALE_RULE_MSE);
  spec.set_rounding(v1::ROUNDING_STOCHASTIC);
  spec.set_seed(77);
  spec.set_order(v1::ORDER_DECREASING_NORM);
  spec.set_format(v1::FORMAT_GPTQ_V2);
  spec.mutable_damping()->mutable_held_out()->add_ladder(0.5);
  spec.mutable_damping()->set_max_attempts(3);
  spec.mutable_certificate()->set_compare_nearest(true);
  engine::LayerCertificate certificate;
  certificate.spec = *engine::ResolveSpec(*FromProto(spec));
  const v1::QuantizationSpec echo = ToProto(certificate, CallFacts())[0].spec();
  v1::QuantizationSpec expected = spec;
  expected.set_scale_dtype(v1::DATA_TYPE_F16);
  expected.set_scale_trials(1);
  expected.set_signed_scales(false);
  expected.set_polish(0);
  expected.mutable_damping()->mutable_held_out()->set_climb(false);
  expected.set_min_tokens(1);
  expected.mutable_damping()->set_factor(10);
  expected.mutable_damping()->set_on_failure(v1::ON_FAILURE_FAIL);
  expected.mutable_certificate()->set_per_row(true);
  expected.mutable_certificate()->set_failure_probability(1e-3);
  EXPECT_EQ(echo.SerializeAsString(), expected.SerializeAsString()) << echo.DebugString();
}

engine::LayerCertificate SomeCertificate(int64_t rows) {
  engine::LayerCertificate certificate;
  certificate.rows = rows;
  certificate.features = 8;
  certificate.tokens = 9;
  certificate.spec.bits = 5;
  certificate.outcome = engine::Outcome::kFellBackToNearest;
  certificate.warnings = {"careful"};
  certificate.damping_attempts = {{0.5, engine::StabilityCause::kPivot, "pivot 3"},
                                  {5, engine::StabilityCause::kNone, ""}};
  certificate.relative_error = 0.25;
  certificate.nearest_relative_error = 0.5;
  for (int64_t r = 0; r < rows; ++r) {
    certificate.row_error.push_back(static_cast<double>(r));
    certificate.row_bound.push_back(static_cast<double>(2 * r));
  }
  return certificate;
}

v1::Certificate Merged(const std::vector<v1::Certificate>& parts) {
  v1::Certificate whole;
  for (const v1::Certificate& part : parts) whole.MergeFrom(part);
  return whole;
}

TEST(ConvertTest, CertificateSurvivesAnyCut) {
  const engine::LayerCertificate certificate = SomeCertificate(10);
  CallFacts facts;
  facts.weights_sha256 = "aa";
  facts.x_sha256 = "bb";
  facts.receive_seconds = 1.5;
  facts.queue_seconds = 2.5;
  const std::string whole = Merged(ToProto(certificate, facts)).SerializeAsString();
  for (const int64_t step : {1, 3, 5, 10, 11}) {
    const auto parts = ToProto(certificate, facts, step);
    EXPECT_EQ(parts.size(), static_cast<size_t>((10 + step - 1) / step));
    EXPECT_EQ(Merged(parts).SerializeAsString(), whole);
  }
  const v1::Certificate message = Merged(ToProto(certificate, facts));
  EXPECT_EQ(message.schema_version(), 1);
  EXPECT_EQ(message.weights_sha256(), "aa");
  EXPECT_EQ(message.x_sha256(), "bb");
  EXPECT_EQ(message.method(), v1::METHOD_OPTQ);
  EXPECT_EQ(message.bits(), 5);
  EXPECT_EQ(message.outcome(), v1::OUTCOME_FELL_BACK_TO_NEAREST);
  EXPECT_EQ(message.damping_attempts(0).cause(), v1::STABILITY_CAUSE_PIVOT);
  EXPECT_EQ(message.damping_attempts(1).cause(), v1::STABILITY_CAUSE_NONE);
  EXPECT_EQ(message.nearest_relative_error(), 0.5);
  EXPECT_FALSE(message.has_linf_bound());
  EXPECT_EQ(message.row_error(7), 7);
  EXPECT_EQ(message.row_bound(7), 14);
  EXPECT_EQ(message.phase_seconds().receive(), 1.5);
  EXPECT_EQ(message.phase_seconds().queue(), 2.5);
}

TEST(ConvertTest, FramesOfALargeCertificateStayBelowFourMebibytes) {
  for (const v1::Certificate& part : ToProto(SomeCertificate(server::kMaxRows), {})) {
    EXPECT_LT(part.ByteSizeLong(), size_t{4} << 20);
  }
}

TEST(ConvertTest, RowsCanBeLeftOut) {
  engine::LayerCertificate certificate = SomeCertificate(10);
  certificate.spec.per_row = false;
  const auto parts = ToProto(certificate, {});
  ASSERT_EQ(parts.size(), 1);
  EXPECT_EQ(parts[0].row_error_size(), 0);
  EXPECT_EQ(parts[0].row_bound_size(), 0);
}

TEST(ConvertTest, EnumsComeBack) {
  for (const auto phase : {engine::Phase::kReceive, engine::Phase::kQueue, engine::Phase::kFactor,
                           engine::Phase::kRound, engine::Phase::kCertify,
                           engine::Phase::kReference, engine::Phase::kPack}) {
    EXPECT_NE(ToProto(phase), v1::PHASE_UNSPECIFIED);
  }
  EXPECT_EQ(ToProto(engine::DType::kI32), v1::DATA_TYPE_I32);
}

}  // namespace
}  // namespace certiq::server
