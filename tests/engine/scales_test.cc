// Scale rules from a layer's tokens to its result.

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <functional>
#include <vector>

#include "engine/certificate.h"
#include "engine/quantize_layer.h"
#include "tests/engine/problems.h"

namespace certiq::engine {
namespace {

using testing::Inputs;
using testing::ScaleSetting;

ResolvedSpec Spec(Method method, ScaleRule scale, int bits) {
  ResolvedSpec spec;
  spec.method = method;
  spec.scale = scale;
  spec.bits = bits;
  spec.damping_rule = DampingRule::kRelativeTrace;
  spec.damping_value = 0.02;
  return spec;
}

testing::RandomLayer MakeLayer(int64_t features, int64_t rows, bool mismatched, uint64_t seed) {
  testing::RandomLayer layer =
      testing::MakeLayer(3 * features, features, rows, Inputs::kCorrelated, seed);
  if (mismatched) layer.x_quantized = testing::Disturbed(layer.x, 0.2, seed + 1);
  return layer;
}

// The sum over tokens of |x w - x~ q|^2 of a dense result, over all rows.
double TrueError(const testing::RandomLayer& layer, const QuantizedLayer& result) {
  const std::vector<double> weight = testing::TensorValues(result, "weight");
  double error = 0;
  for (int64_t t = 0; t < layer.x.rows; ++t) {
    for (int64_t r = 0; r < layer.w.rows; ++r) {
      double sum = 0;
      for (int64_t j = 0; j < layer.w.cols; ++j) {
        sum += layer.x(t, j) * layer.w(r, j) -
               layer.inputs()(t, j) * weight[static_cast<size_t>(r * layer.w.cols + j)];
      }
      error += sum * sum;
    }
  }
  return error;
}

const ScaleSetting kSettings[] = {
    {Method::kNearest, ScaleRule::kPiso, 0, GroupScales::kStatic},
    {Method::kNearest, ScaleRule::kPiso, 16, GroupScales::kStatic},
    {Method::kOptq, ScaleRule::kPiso, 0, GroupScales::kStatic},
    {Method::kOptq, ScaleRule::kPiso, 16, GroupScales::kStatic},
    {Method::kOptq, ScaleRule::kPiso, 16, GroupScales::kDynamic},
    {Method::kOptq, ScaleRule::kCompensated, 0, GroupScales::kStatic},
    {Method::kOptq, ScaleRule::kCompensated, 16, GroupScales::kStatic},
    {Method::kOptq, ScaleRule::kCompensated, 16, GroupScales::kDynamic},
    {Method::kQronos, ScaleRule::kPiso, 0, GroupScales::kStatic},
    {Method::kQronos, ScaleRule::kPiso, 16, GroupScales::kDynamic},
    {Method::kQronos, ScaleRule::kCompensated, 0, GroupScales::kStatic},
    {Method::kQronos, ScaleRule::kCompensated, 16, GroupScales::kDynamic},
};

// On 2 bits absmax is so far off that any of these must be better; threads and order of work change
// no bit; the certificate tells the true error within its bound.
TEST(ScalesTest, EveryRuleBeatsAbsmaxAndIsCertified) {
  for (const bool mismatched : {false, true}) {
    const testing::RandomLayer layer = MakeLayer(72, 37, mismatched, 61);
    for (const ScaleSetting& setting : kSettings) {
      for (const bool symmetric : {true, false}) {
        for (const Order order : {Order::kNatural, Order::kDecreasingNorm}) {
          ResolvedSpec spec = Spec(setting.method, setting.scale, 2);
          spec.group_size = setting.group_size;
          spec.group_scales = setting.groups;
          spec.symmetric = symmetric;
          spec.order = order;
          spec.scale_dtype = DType::kF16;
          const auto result = testing::Quantize(layer, spec);
          ASSERT_TRUE(result.ok()) << result.status();
          testing::ContraryExecutor threads;
          const auto again = testing::Quantize(layer, spec, &threads);
          ASSERT_TRUE(again.ok()) << again.status();
          ASSERT_EQ(result->tensors.size(), again->tensors.size());
          for (size_t i = 0; i < result->tensors.size(); ++i) {
            EXPECT_EQ(result->tensors[i].bytes, again->tensors[i].bytes);
          }

          const LayerCertificate& certificate = result->certificate;
          const double error = TrueError(layer, *result);
          EXPECT_NEAR(certificate.squared_error, error, 1e-3 * error);
          EXPECT_LE(std::sqrt(error), certificate.l2_bound * (1 + 1e-6));

          ResolvedSpec absmax = spec;
          absmax.scale = ScaleRule::kAbsmax;
          absmax.scale_passes = 0;
          const auto plain = testing::Quantize(layer, absmax);
          ASSERT_TRUE(plain.ok()) << plain.status();
          EXPECT_LT(error, TrueError(layer, *plain))
              << "method " << static_cast<int>(setting.method) << ", scale "
              << static_cast<int>(setting.scale) << ", group " << setting.group_size << ", dynamic "
              << static_cast<int>(setting.groups) << ", symmetric " << symmetric << ", mismatched "
              << mismatched;
        }
      }
    }
  }
}

// PISO of NEAREST is about the very error that is certified.
TEST(ScalesTest, NearestWithPisoHasTheLeastErrorOfAnyScale) {
  for (const bool mismatched : {false, true}) {
    const testing::RandomLayer layer = MakeLayer(40, 5, mismatched, 71);
    ResolvedSpec spec = Spec(Method::kNearest, ScaleRule::kPiso, 3);
    const auto result = testing::Quantize(layer, spec);
    ASSERT_TRUE(result.ok()) << result.status();
    const std::vector<double> scales = testing::TensorValues(*result, "scales");
    ASSERT_EQ(scales.size(), 5U);
    const std::vector<double> least = result->certificate.row_error;
    for (double factor = 0.4; factor < 2.5; factor *= 1.02) {
      ResolvedSpec given = spec;
      given.scale = ScaleRule::kAbsmax;
      const auto grid_of_given = std::make_shared<ExplicitGrid>();
      given.grid = grid_of_given;
      ExplicitGrid& grid = *grid_of_given;
      for (const double scale : scales) grid.scales.push_back(static_cast<float>(scale * factor));
      const auto other = testing::Quantize(layer, given);
      ASSERT_TRUE(other.ok()) << other.status();
      for (size_t r = 0; r < scales.size(); ++r) {
        EXPECT_LE(least[r], other->certificate.row_error[r] * (1 + 1e-5))
            << "row " << r << ", " << factor << " times the scale";
      }
    }
  }
}

// Dynamic COMPENSATED in float64: with the engine's codes before a group given, no scale suits the
// updated weights better than the one it took.
TEST(ScalesTest, DynamicCompensatedIsTheBestForTheUpdatedWeights) {
  constexpr int64_t kGroup = 16;
  const testing::RandomLayer layer = MakeLayer(80, 4, false, 81);
  for (const bool symmetric : {true, false}) {
    ResolvedSpec spec = Spec(Method::kOptq, ScaleRule::kCompensated, 3);
    spec.group_size = kGroup;
    spec.group_scales = GroupScales::kDynamic;
    spec.symmetric = symmetric;
    const auto result = testing::Quantize(layer, spec);
    ASSERT_TRUE(result.ok()) << result.status();
    const std::vector<double> weight = testing::TensorValues(*result, "weight");
    const std::vector<double> scales = testing::TensorValues(*result, "scales");
    const std::vector<double> zeros = testing::TensorValues(*result, "zeros");
    textbook::Matrix h = textbook::Gram(layer.x);
    for (int64_t j = 0; j < h.rows; ++j) h(j, j) += result->certificate.lambda_used;
    textbook::Matrix u;
    std::vector<double> d;
    ASSERT_TRUE(textbook::ReverseFactor(h, u, d));
    const int64_t n = layer.w.cols;
    for (int64_t r = 0; r < layer.w.rows; ++r) {
      for (int64_t g = 0; g < n / kGroup; ++g) {
        const int64_t first = g * kGroup;
        std::vector<double> moved(kGroup);
        for (int64_t j = 0; j < kGroup; ++j) {
          double& x = moved[static_cast<size_t>(j)];
          for (int64_t k = 0; k < first; ++k) {
            x += (layer.w(r, k) - weight[static_cast<size_t>(r * n + k)]) * u(k, first + j);
          }
          for (int64_t k = 0; k < j; ++k) {
            x -= moved[static_cast<size_t>(k)] * u(first + k, first + j);
          }
        }
        const auto at = static_cast<size_t>(r * (n / kGroup) + g);
        const auto error = [&](double scale, double zero) {
          double sum = 0;
          for (int64_t j = 0; j < kGroup; ++j) {
            const double v = layer.w(r, first + j) + moved[static_cast<size_t>(j)];
            const double code = std::clamp(std::nearbyint(v / scale), -zero, 7 - zero);
            sum += d[static_cast<size_t>(first + j)] * (v - scale * code) * (v - scale * code);
          }
          return sum;
        };
        const double zero = symmetric ? 4 : zeros[at];
        // v* is float32 in the engine, and sums of the statistics are within 1e-6.
        const double found = error(scales[at], zero) * (1 - 1e-3);
        for (double factor = 0.3; factor < 3; factor *= 1.003) {
          for (int other = symmetric ? 4 : 0; other <= (symmetric ? 4 : 7); ++other) {
            ASSERT_LE(found, error(scales[at] * factor, other))
                << "row " << r << ", group " << g << ", " << factor << " times the scale, zero "
                << other << " for " << zero;
          }
        }
      }
    }
  }
}

// A layer that falls back has no D; it is rounded with what |X~_j|^2 suggests.
TEST(ScalesTest, CompensatedSurvivesAFallBackToNearest) {
  testing::RandomLayer layer = testing::MakeLayer(20, 30, 4, Inputs::kRankDeficient, 91);
  ResolvedSpec spec = Spec(Method::kOptq, ScaleRule::kCompensated, 4);
  spec.damping_value = 0;
  spec.max_attempts = 1;
  spec.on_failure = OnFailure::kNearest;
  const auto result = testing::Quantize(layer, spec);
  ASSERT_TRUE(result.ok()) << result.status();
  EXPECT_EQ(result->certificate.outcome, Outcome::kFellBackToNearest);
}

}  // namespace
}  // namespace certiq::engine
