// Lambda and sums at the ends of float64, and sums that no activations have: a certificate holds
// true and finite numbers, or there is none.

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "base/status.h"
#include "tests/engine/problems.h"
#include "tests/engine/specs.h"

namespace certiq::engine {
namespace {

using testing::Inputs;
using testing::MakeLayer;
using testing::RandomLayer;

std::vector<double> NumbersOf(const LayerCertificate& c) {
  std::vector<double> numbers{c.lambda_requested,
                              c.lambda_used,
                              c.condition_estimate,
                              c.squared_error,
                              c.damped_squared_error,
                              c.squared_error_rounding,
                              c.reference_energy,
                              c.reference_energy_rounding,
                              c.relative_error,
                              c.l2_bound,
                              c.identity_residual,
                              c.c2,
                              c.c_inf,
                              c.worst_overshoot,
                              c.nearest_relative_error.value_or(0),
                              c.predicted_squared_error.value_or(0),
                              c.rate_gap_bits.value_or(0),
                              c.linf_bound.value_or(0),
                              c.held_out_relative_error.value_or(0),
                              c.held_out_nearest_relative_error.value_or(0),
                              c.qronos_initial.value_or(0),
                              c.optq_initial.value_or(0),
                              c.floor.value_or(0)};
  for (const DampingAttempt& attempt : c.damping_attempts) numbers.push_back(attempt.lambda);
  for (const DampingCandidate& candidate : c.damping_candidates) {
    numbers.push_back(candidate.lambda);
    numbers.push_back(candidate.held_out_relative_error);
  }
  for (const auto* rows : {&c.row_error, &c.row_bound, &c.row_rounding}) {
    numbers.insert(numbers.end(), rows->begin(), rows->end());
  }
  return numbers;
}

// A finite and true certificate, or a refusal that names one of `fields`. Whether there was one.
bool ExpectTrueOrRefused(const RandomLayer& problem, const ResolvedSpec& spec,
                         const std::vector<std::string>& fields) {
  const auto layer = testing::Quantize(problem, spec);
  if (!layer.ok()) {
    EXPECT_EQ(layer.status().code(), absl::StatusCode::kInvalidArgument) << layer.status();
    const std::string field = base::FieldOf(layer.status()).value_or("");
    EXPECT_NE(std::find(fields.begin(), fields.end(), field), fields.end()) << layer.status();
    return false;
  }
  for (const double number : NumbersOf(layer->certificate)) EXPECT_TRUE(std::isfinite(number));
  const std::vector<double> q = testing::TensorValues(*layer, "weight");
  for (int64_t r = 0; r < problem.w.rows; ++r) {
    std::vector<double> change = testing::Row(problem.w, r);
    for (size_t j = 0; j < change.size(); ++j) {
      change[j] -= q[static_cast<size_t>(r * problem.w.cols) + j];
    }
    const double error = std::sqrt(textbook::SquaredImage(problem.x, change));
    const auto at = static_cast<size_t>(r);
    EXPECT_LE(error, layer->certificate.row_bound[at] * (1 + 1e-9));
    // float32 products of 16 features: far below.
    EXPECT_NEAR(layer->certificate.row_error[at], error, 1e-3 * error);
  }
  return true;
}

RandomLayer Scaled(double x, double w) {
  RandomLayer problem = MakeLayer(100, 16, 5, Inputs::kGaussian, 1093);
  for (double& v : problem.x.values) v = static_cast<float>(v / 6 * x);
  for (double& v : problem.w.values) v = static_cast<float>(v * 3 * w);
  return problem;
}

TEST(ExtremeDampingTest, IsHandledOrRefusedByName) {
  for (const DampingRule rule :
       {DampingRule::kAbsolute, DampingRule::kRelativeTrace, DampingRule::kRelativeSigmaMax}) {
    const char* const field = rule == DampingRule::kAbsolute ? "spec.damping.absolute"
                              : rule == DampingRule::kRelativeTrace
                                  ? "spec.damping.relative_trace"
                                  : "spec.damping.relative_sigma_max";
    for (const Method method : {Method::kOptq, Method::kQronos}) {
      for (const double value : {1e-300, 1e10, 1e38, 1e77, 1e154, 1e200, 1e290, 1e300, 1.7e308}) {
        ResolvedSpec spec;
        spec.method = method;
        spec.damping_rule = rule;
        spec.damping_value = value;
        SCOPED_TRACE(field);
        SCOPED_TRACE(value);
        const bool certified = ExpectTrueOrRefused(Scaled(1, 1), spec, {field});
        // lambda |W - Q|^2 is below lambda R N max |w|^2 < 100 lambda here.
        EXPECT_TRUE(certified || value > 1e300);
        ExpectTrueOrRefused(Scaled(3e38, 1), spec, {field, "weight"});
        ExpectTrueOrRefused(Scaled(1, 3e38), spec, {field, "weight"});
        ExpectTrueOrRefused(Scaled(3e38, 3e38), spec, {field, "weight"});
      }
    }
  }
}

TEST(ExtremeDampingTest, LaddersToo) {
  for (const double value : {1e38, 1e200, 1e300, 1.7e308}) {
    RandomLayer problem = Scaled(1, 1);
    problem.held_x = Scaled(2, 1).x;
    ResolvedSpec spec;
    spec.damping_rule = DampingRule::kHeldOut;
    spec.damping_candidates = {value};
    SCOPED_TRACE(value);
    problem.x_quantized = textbook::Matrix();
    const auto layer = testing::Quantize(problem, spec);
    if (!layer.ok()) {
      EXPECT_EQ(base::FieldOf(layer.status()), "spec.damping.held_out.ladder") << layer.status();
      continue;
    }
    for (const double number : NumbersOf(layer->certificate)) EXPECT_TRUE(std::isfinite(number));
  }
}

TEST(ExtremeSumsTest, EntriesAtTheEndOfFloat32) {
  for (const Method method : {Method::kOptq, Method::kNearest}) {
    for (const double x : {1e-30, 1.0, 1e19, 3e38}) {
      for (const double w : {1e-30, 1.0, 1e19, 3e38}) {
        ResolvedSpec spec;
        spec.method = method;
        SCOPED_TRACE(x);
        SCOPED_TRACE(w);
        ExpectTrueOrRefused(Scaled(x, w), spec, {"weight"});
      }
    }
  }
}

// Sums of the given matrix, as an import brings them.
absl::StatusOr<QuantizedLayer> QuantizeOn(const textbook::Matrix& gram, const textbook::Matrix& w,
                                          ResolvedSpec spec, bool as_held_out = false) {
  const auto sums_of = [](const textbook::Matrix& of) {
    Statistics sums;
    sums.tokens = 1000;
    sums.gram = UpperTriangle<double>(of.rows);
    for (int64_t i = 0; i < of.rows; ++i) {
      for (int64_t j = i; j < of.cols; ++j) sums.gram.at(i, j) = of(i, j);
    }
    return std::make_shared<const Statistics>(std::move(sums));
  };
  spec.grid = std::make_shared<const ExplicitGrid>(
      ExplicitGrid{std::vector<float>(static_cast<size_t>(w.rows), 1.0f), {}, {}, {}});
  textbook::Matrix unit(gram.rows, gram.cols);
  for (int64_t i = 0; i < gram.rows; ++i) unit(i, i) = 1;
  SerialExecutor serial;
  RunContext context;
  context.executor = &serial;
  LayerProblem problem{testing::Completed(spec), testing::Strips(w),
                       sums_of(as_held_out ? unit : gram)};
  if (as_held_out) problem.held_out = sums_of(gram);
  problem.calibration = "cal-17";
  return QuantizeLayer(std::move(problem), context);
}

// Unit diagonal; for (1, -1, 1) the form is 3 - 6 c: below zero for c > 1/2, though each entry is
// less than Cauchy-Schwarz allows.
textbook::Matrix Contradictory(double c) {
  textbook::Matrix gram(3, 3);
  const double entries[] = {1, c, -c, c, 1, c, -c, c, 1};
  gram.values.assign(entries, entries + 9);
  return gram;
}

TEST(ImpossibleSumsTest, AreRefusedWhereTheyShow) {
  textbook::Matrix w(2, 3);
  // All round to zero, so that the change is W itself; the first row has a true norm.
  const double values[] = {0.4, 0.4, 0.1, 0.4, -0.4, 0.4};
  w.values.assign(values, values + 6);
  for (const double c : {0.51, 0.7, 0.9}) {
    for (const bool held_out : {false, true}) {
      for (const Method method : {Method::kNearest, Method::kOptq, Method::kQronos}) {
        ResolvedSpec spec;
        spec.method = method;
        spec.damping_rule = DampingRule::kAbsolute;
        spec.damping_value = 5;
        const auto layer = QuantizeOn(Contradictory(c), w, spec, held_out);
        ASSERT_EQ(layer.status().code(), absl::StatusCode::kFailedPrecondition) << layer.status();
        EXPECT_EQ(base::PreconditionOf(layer.status())->subject, "calibration_id");
        EXPECT_EQ(layer.status().message().find("calibration cal-17: "), 0u) << layer.status();
        EXPECT_NE(layer.status().message().find("row 1"), std::string::npos) << layer.status();
      }
    }
  }
}

// Below zero by rounding alone: what is certified is the rounding, not zero.
TEST(ImpossibleSumsTest, RoundingIsCertifiedInPlaceOfZero) {
  textbook::Matrix gram(2, 2);
  // |X (1, -1)|^2 = 2 - 2 (1 + 2^-23): a float32 sum may well be that.
  const double entries[] = {1, 1 + 0x1p-23, 1 + 0x1p-23, 1};
  gram.values.assign(entries, entries + 4);
  textbook::Matrix w(1, 2);
  w(0, 0) = 0.25;
  w(0, 1) = -0.25;
  for (const Method method : {Method::kNearest, Method::kOptq}) {
    ResolvedSpec spec;
    spec.method = method;
    const auto layer = QuantizeOn(gram, w, spec);
    ASSERT_TRUE(layer.ok()) << layer.status();
    const LayerCertificate& c = layer->certificate;
    EXPECT_GT(c.row_rounding[0], 0);
    // (sum |d_j| |X_j|)^2 = 1/4, of which 2^-20 is more than any of the roundings add up to.
    EXPECT_LE(c.row_rounding[0], 0.25 * 0x1p-19);
    EXPECT_NEAR(c.row_error[0] * c.row_error[0], c.row_rounding[0], 1e-12 * c.row_rounding[0]);
    EXPECT_GE(c.row_bound[0], c.row_error[0]);
  }
}

}  // namespace
}  // namespace certiq::engine
