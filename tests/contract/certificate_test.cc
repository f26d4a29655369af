#include "contract/certificate.h"

#include <gtest/gtest.h>

#include <string>
#include <utility>
#include <vector>

#include "contract/limits.h"
#include "contract/resolve_spec.h"

namespace certiq::server {
namespace {

// The settings as decided come back in the certificate as they could be sent.
TEST(CertificateTest, CertificateEchoesTheSpec) {
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
  certificate.spec = *ResolveSpec(spec);
  const v1::QuantizationSpec echo = ToProto(certificate, CertificateFacts())[0].spec();
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
  certificate.underflow = {7, 3, {1, 4, 9}};
  certificate.relative_error = 0.25;
  certificate.nearest_relative_error = 0.5;
  certificate.held_out_nearest_relative_error = 0.75;
  certificate.squared_error_rounding = 1.25;
  certificate.reference_energy_rounding = 1.75;
  for (int64_t r = 0; r < rows; ++r) {
    certificate.row_error.push_back(static_cast<double>(r));
    certificate.row_bound.push_back(static_cast<double>(2 * r));
    certificate.row_rounding.push_back(static_cast<double>(3 * r));
  }
  return certificate;
}

v1::Certificate Merged(const std::vector<v1::Certificate>& parts) {
  v1::Certificate whole;
  for (const v1::Certificate& part : parts) whole.MergeFrom(part);
  return whole;
}

TEST(CertificateTest, CertificateSurvivesAnyCut) {
  const engine::LayerCertificate certificate = SomeCertificate(10);
  CertificateFacts facts;
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
  EXPECT_EQ(message.underflow().groups(), 7);
  EXPECT_EQ(message.underflow().rows(), 3);
  ASSERT_EQ(message.underflow().first_rows_size(), 3);
  EXPECT_EQ(message.underflow().first_rows(2), 9);
  EXPECT_FALSE(ToProto(engine::LayerCertificate(), {})[0].has_underflow());
  EXPECT_EQ(message.row_error(7), 7);
  EXPECT_EQ(message.row_bound(7), 14);
  EXPECT_EQ(message.row_rounding(7), 21);
  EXPECT_EQ(message.squared_error_rounding(), 1.25);
  EXPECT_EQ(message.reference_energy_rounding(), 1.75);
  EXPECT_EQ(message.held_out_nearest_relative_error(), 0.75);
  EXPECT_EQ(message.phase_seconds().receive(), 1.5);
  EXPECT_EQ(message.phase_seconds().queue(), 2.5);
}

TEST(CertificateTest, FramesOfALargeCertificateStayBelowFourMebibytes) {
  for (const v1::Certificate& part : ToProto(SomeCertificate(kMaxRows), {})) {
    EXPECT_LT(part.ByteSizeLong(), size_t{4} << 20);
  }
}

TEST(CertificateTest, RowsCanBeLeftOut) {
  engine::LayerCertificate certificate = SomeCertificate(10);
  certificate.spec.per_row = false;
  const auto parts = ToProto(certificate, {});
  ASSERT_EQ(parts.size(), 1);
  EXPECT_EQ(parts[0].row_error_size(), 0);
  EXPECT_EQ(parts[0].row_bound_size(), 0);
  EXPECT_EQ(parts[0].row_rounding_size(), 0);
}

TEST(ResultHeaderTest, NamesTypesShapesAndTheSum) {
  engine::ResultTensor weight{"weight", engine::DType::kF32, {2, 3}, {}};
  weight.bytes.resize(24);
  engine::ResultTensor order{"g_idx", engine::DType::kI32, {3}, {}};
  order.bytes.resize(12);
  std::vector<engine::ResultTensor> tensors;
  tensors.push_back(std::move(weight));
  tensors.push_back(std::move(order));
  const v1::ResultHeader header = ToProto(tensors);
  ASSERT_EQ(header.tensors_size(), 2);
  EXPECT_EQ(header.total_bytes(), 36);
  EXPECT_EQ(header.tensors(0).name(), "weight");
  EXPECT_EQ(header.tensors(0).dtype(), v1::DATA_TYPE_F32);
  EXPECT_EQ(header.tensors(0).shape_size(), 2);
  EXPECT_EQ(header.tensors(0).shape(1), 3);
  EXPECT_EQ(header.tensors(1).name(), "g_idx");
  EXPECT_EQ(header.tensors(1).dtype(), v1::DATA_TYPE_I32);
  EXPECT_EQ(header.tensors(1).shape_size(), 1);
}

}  // namespace
}  // namespace certiq::server
