// Symmetric grids that may be turned over by a negative scale.

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <vector>

#include "engine/certificate.h"
#include "engine/quantize_layer.h"
#include "tests/engine/problems.h"

namespace certiq::engine {
namespace {

using testing::Inputs;
using testing::ScaleSetting;

const ScaleSetting kSettings[] = {
    {Method::kNearest, ScaleRule::kMse, 0, GroupScales::kStatic},
    {Method::kNearest, ScaleRule::kPiso, 16, GroupScales::kStatic},
    {Method::kOptq, ScaleRule::kMse, 16, GroupScales::kDynamic},
    {Method::kOptq, ScaleRule::kPiso, 0, GroupScales::kStatic},
    {Method::kOptq, ScaleRule::kPiso, 16, GroupScales::kDynamic},
    {Method::kOptq, ScaleRule::kCompensated, 0, GroupScales::kStatic},
    {Method::kOptq, ScaleRule::kCompensated, 16, GroupScales::kDynamic},
    {Method::kQronos, ScaleRule::kCompensated, 0, GroupScales::kStatic},
};

ResolvedSpec Spec(const ScaleSetting& setting) {
  ResolvedSpec spec;
  spec.method = setting.method;
  spec.scale = setting.scale;
  spec.bits = 2;
  spec.group_size = setting.group_size;
  spec.group_scales = setting.groups;
  spec.order = Order::kDecreasingNorm;
  spec.scale_dtype = DType::kF16;
  spec.signed_scales = true;
  if (spec.method == Method::kQronos) spec.damping_rule.reset();
  return spec;
}

// Rows whose tails are on one side, now on this and now on the other.
testing::RandomLayer SkewedLayer(uint64_t seed) {
  testing::RandomLayer layer = testing::MakeLayer(150, 48, 21, Inputs::kCorrelated, seed);
  for (int64_t r = 0; r < layer.w.rows; ++r) {
    for (int64_t j = 0; j < layer.w.cols; ++j) {
      double& w = layer.w(r, j);
      if ((w > 0) == (r % 2 == 0)) w = static_cast<float>(w * 1.7);
    }
  }
  return layer;
}

// Level s (u - 2), u = 0 ... 3, of every weight; some scales of either sign.
TEST(SignedScalesTest, WeightsAreLevelsOfTheirSignedGrids) {
  const testing::RandomLayer layer = SkewedLayer(5);
  const int64_t n = layer.w.cols;
  for (const ScaleSetting& setting : kSettings) {
    const auto result = testing::Quantize(layer, Spec(setting));
    ASSERT_TRUE(result.ok()) << result.status();
    const std::vector<double> weight = testing::TensorValues(*result, "weight");
    const std::vector<double> scales = testing::TensorValues(*result, "scales");
    EXPECT_TRUE(testing::TensorValues(*result, "zeros").empty());
    const int64_t groups = static_cast<int64_t>(scales.size()) / layer.w.rows;
    std::vector<double> index = testing::TensorValues(*result, "g_idx");
    if (index.empty()) index.assign(static_cast<size_t>(n), 0);
    int negative = 0;
    for (const double scale : scales) negative += scale < 0 ? 1 : 0;
    EXPECT_GT(negative, 0);
    EXPECT_LT(negative, static_cast<int>(scales.size()));
    bool lowest = false;
    for (int64_t r = 0; r < layer.w.rows; ++r) {
      for (int64_t j = 0; j < n; ++j) {
        const auto g = static_cast<int64_t>(index[static_cast<size_t>(j)]);
        const double level =
            weight[static_cast<size_t>(r * n + j)] / scales[static_cast<size_t>(r * groups + g)];
        ASSERT_EQ(level, std::nearbyint(level));
        ASSERT_GE(level, -2);
        ASSERT_LE(level, 1);
        lowest = lowest || level == -2;
      }
    }
    EXPECT_TRUE(lowest);
  }
}

// Minus W is rounded to minus what W is rounded to, with the opposite scales. (Not so for groups so
// small that no weight needs the longer side: there one sign is as good as the other.)
TEST(SignedScalesTest, TheMirrorImageOfALayerHasTheMirrorImageOfItsResult) {
  const testing::RandomLayer layer = SkewedLayer(6);
  testing::RandomLayer mirrored = layer;
  for (double& w : mirrored.w.values) w = -w;
  for (const ScaleSetting& setting : kSettings) {
    if (setting.group_size != 0) continue;
    const auto result = testing::Quantize(layer, Spec(setting));
    const auto image = testing::Quantize(mirrored, Spec(setting));
    ASSERT_TRUE(result.ok() && image.ok()) << result.status() << image.status();
    for (const char* role : {"weight", "scales"}) {
      const std::vector<double> values = testing::TensorValues(*result, role);
      std::vector<double> negated = testing::TensorValues(*image, role);
      for (double& value : negated) value = -value;
      EXPECT_EQ(values, negated) << role;
    }
    EXPECT_EQ(result->certificate.squared_error, image->certificate.squared_error);
    EXPECT_EQ(result->certificate.l2_bound, image->certificate.l2_bound);
    EXPECT_EQ(result->certificate.bits_needed, image->certificate.bits_needed);
  }
}

// With NEAREST and PISO the search is for the least error there is, and more grids to choose from
// are never worse; on skewed rows they are better.
TEST(SignedScalesTest, NearestWithPisoLosesNoRow) {
  const testing::RandomLayer layer = SkewedLayer(7);
  ResolvedSpec spec = Spec({Method::kNearest, ScaleRule::kPiso, 0, GroupScales::kStatic});
  const auto either = testing::Quantize(layer, spec);
  spec.signed_scales = false;
  const auto positive = testing::Quantize(layer, spec);
  ASSERT_TRUE(either.ok() && positive.ok()) << either.status() << positive.status();
  int better = 0;
  for (size_t r = 0; r < either->certificate.row_error.size(); ++r) {
    const double here = either->certificate.row_error[r];
    const double there = positive->certificate.row_error[r];
    EXPECT_LE(here, there * (1 + 1e-6)) << "row " << r;
    better += here < 0.98 * there ? 1 : 0;
  }
  EXPECT_GT(better, 3);
}

// The 2-bit codes of a tensor of packed words.
std::vector<int> Codes(const QuantizedLayer& layer, const char* role) {
  for (const ResultTensor& tensor : layer.tensors) {
    if (tensor.role != role) continue;
    std::vector<int> codes;
    for (const std::byte byte : tensor.bytes) {
      for (int bit = 0; bit < 8; bit += 2) codes.push_back(std::to_integer<int>(byte >> bit) & 3);
    }
    return codes;
  }
  return {};
}

// Packed codes and scales stand for the dense result's weights.
TEST(SignedScalesTest, PackedFormatsHoldTheSameWeights) {
  testing::RandomLayer layer = SkewedLayer(8);
  layer.w.rows = 16;
  layer.w.values.resize(static_cast<size_t>(layer.w.rows * layer.w.cols));
  ResolvedSpec spec = Spec({Method::kOptq, ScaleRule::kCompensated, 0, GroupScales::kStatic});
  const auto dense = testing::Quantize(layer, spec);
  spec.format = Format::kGptqV2;
  const auto gptq = testing::Quantize(layer, spec);
  spec.format = Format::kCompressedTensors;
  const auto compressed = testing::Quantize(layer, spec);
  ASSERT_TRUE(dense.ok() && gptq.ok() && compressed.ok())
      << dense.status() << gptq.status() << compressed.status();
  const std::vector<double> weight = testing::TensorValues(*dense, "weight");
  const std::vector<int> qweight = Codes(*gptq, "qweight");
  const std::vector<double> gptq_scales = testing::TensorValues(*gptq, "scales");
  const std::vector<int> packed = Codes(*compressed, "weight_packed");
  const std::vector<double> scales = testing::TensorValues(*compressed, "weight_scale");
  const int64_t n = layer.w.cols;
  const int64_t rows = layer.w.rows;
  ASSERT_EQ(qweight.size(), weight.size());
  ASSERT_EQ(packed.size(), weight.size());
  int negative = 0;
  for (int64_t r = 0; r < rows; ++r) {
    const auto row = static_cast<size_t>(r);
    negative += scales[row] < 0 ? 1 : 0;
    for (int64_t j = 0; j < n; ++j) {
      const double expected = weight[static_cast<size_t>(r * n + j)];
      const int first = qweight[static_cast<size_t>((j / 16 * rows + r) * 16 + j % 16)];
      ASSERT_EQ(gptq_scales[row] * (first - 2), expected);
      const int second = packed[static_cast<size_t>(r * n + j)];
      ASSERT_EQ(scales[row] * (second - 2), expected);
    }
  }
  EXPECT_GT(negative, 0);
}

}  // namespace
}  // namespace certiq::engine
