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
