// Weights that the types of scales and levels are too coarse for become zeros, and are counted;
// those they are too narrow for are refused by name.

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <string>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "base/status.h"
#include "tests/engine/problems.h"
#include "tests/engine/specs.h"

namespace certiq::engine {
namespace {

using testing::Inputs;
using testing::RandomLayer;

constexpr int64_t kRows = 40;
constexpr int64_t kFeatures = 96;
constexpr int64_t kGroup = 32;

// Weights of 0.05 or so, but rows 5 and 22 and the second group of row 31 between `size` and twice
// that, of either sign.
RandomLayer LayerWithSmallWeights(double size, uint64_t seed) {
  RandomLayer layer = testing::MakeLayer(200, kFeatures, kRows, Inputs::kCorrelated, seed);
  const auto shrink = [&](int64_t r, int64_t j) {
    const double w = layer.w(r, j);
    layer.w(r, j) =
        static_cast<float>((w < 0 ? -size : size) * (1 + std::min(1.0, 5 * std::abs(w))));
  };
  for (int64_t j = 0; j < kFeatures; ++j) {
    shrink(5, j);
    shrink(22, j);
    if (j / kGroup == 1) shrink(31, j);
  }
  return layer;
}

// |X (w_r - q_r)| in float64.
double RowError(const RandomLayer& layer, const std::vector<double>& q, int64_t r) {
  double sum = 0;
  for (int64_t t = 0; t < layer.x.rows; ++t) {
    double token = 0;
    for (int64_t j = 0; j < kFeatures; ++j) {
      token += layer.x(t, j) * (layer.w(r, j) - q[static_cast<size_t>(r * kFeatures + j)]);
    }
    sum += token * token;
  }
  return std::sqrt(sum);
}

struct Rule {
  Method method;
  ScaleRule scale;
  GroupScales groups = GroupScales::kStatic;
  int32_t trials = 1;
  int32_t polish = 0;
  Rounding rounding = Rounding::kNearest;
};

const Rule kRules[] = {
    {Method::kNearest, ScaleRule::kAbsmax},
    {Method::kNearest, ScaleRule::kPiso},
    {Method::kNearest, ScaleRule::kMse, GroupScales::kStatic, 1, 0, Rounding::kStochastic},
    {Method::kOptq, ScaleRule::kAbsmax},
    {Method::kOptq, ScaleRule::kMse, GroupScales::kStatic, 3},
    {Method::kOptq, ScaleRule::kCompensated, GroupScales::kDynamic, 3, 2},
    {Method::kOptq, ScaleRule::kPiso, GroupScales::kStatic, 1, 2},
    {Method::kOptq, ScaleRule::kPiso, GroupScales::kDynamic},
    {Method::kOptq, ScaleRule::kAbsmax, GroupScales::kStatic, 1, 0, Rounding::kStochastic},
    {Method::kQronos, ScaleRule::kCompensated},
    {Method::kQronos, ScaleRule::kMse, GroupScales::kDynamic, 2},
};

struct Types {
  DType scales;
  // Of weights for which the type has no scale.
  double size;
  // Its least normal number.
  float least;
};

// What vanishes has a scale that readers take, codes of zero, and bounds that hold; the other rows
// do not see it.
// Whether one of the warnings has these words.
bool Warns(const LayerCertificate& certificate, const std::string& words) {
  return std::any_of(
      certificate.warnings.begin(), certificate.warnings.end(),
      [&](const std::string& warning) { return warning.find(words) != std::string::npos; });
}

TEST(UnderflowTest, BecomesZerosWhateverTheRule) {
  for (const Types& types :
       {Types{DType::kF16, 1e-9, 0x1p-14f}, Types{DType::kBF16, 1e-43, 0x1p-126f},
        Types{DType::kF32, 0x1p-149, 0x1p-126f}}) {
    const RandomLayer layer = LayerWithSmallWeights(types.size, 71);
    const RandomLayer usual = LayerWithSmallWeights(0.05, 71);
    for (const Rule& rule : kRules) {
      for (const int64_t group : {int64_t{0}, kGroup}) {
        for (const bool symmetric : {true, false}) {
          ResolvedSpec spec;
          spec.scale_dtype = types.scales;
          spec.method = rule.method;
          spec.scale = rule.scale;
          spec.group_scales = rule.groups;
          spec.scale_trials = rule.trials;
          spec.polish = rule.polish;
          spec.rounding = rule.rounding;
          spec.group_size = group;
          spec.symmetric = symmetric;
          spec.bits = symmetric ? 4 : 5;
          SCOPED_TRACE(absl::StrCat(
              "scales ", Name(types.scales), " method ", static_cast<int>(rule.method), " rule ",
              static_cast<int>(rule.scale), " dynamic ", static_cast<int>(rule.groups), " group ",
              group, " symmetric ", symmetric));
          const auto result = testing::Quantize(layer, spec);
          ASSERT_TRUE(result.ok()) << result.status();
          const LayerCertificate& certificate = result->certificate;
          const auto q = testing::TensorValues(*result, "weight");
          const auto scales = testing::TensorValues(*result, "scales");
          const int64_t groups = group == 0 ? 1 : kFeatures / group;
          const bool with_group = group != 0 && rule.groups == GroupScales::kStatic;
          ASSERT_TRUE(certificate.underflow.has_value());
          // Feedback from before may lift a group of a row with dynamic scales.
          EXPECT_GE(certificate.underflow->groups, 2);
          ASSERT_GE(certificate.underflow->first_rows.size(), 2U);
          EXPECT_EQ(certificate.underflow->first_rows[0], 5);
          EXPECT_EQ(certificate.underflow->first_rows[1], 22);
          if (with_group) {
            EXPECT_EQ(certificate.underflow->groups, 2 * groups + 1);
            EXPECT_EQ(certificate.underflow->first_rows, (std::vector<int64_t>{5, 22, 31}));
          }
          EXPECT_EQ(certificate.underflow->rows,
                    static_cast<int64_t>(certificate.underflow->first_rows.size()));
          EXPECT_TRUE(Warns(certificate, Name(types.scales)));
          for (const double scale : scales) {
            ASSERT_GT(scale, 0);
            ASSERT_TRUE(std::isfinite(scale));
          }
          for (int64_t j = 0; j < kFeatures; ++j) {
            // A dynamic group behind the first has what feedback made of its weights.
            const bool lifted = group != 0 && rule.groups == GroupScales::kDynamic && j >= kGroup;
            for (const int64_t r : {5, 22}) {
              if (lifted) continue;
              ASSERT_EQ(q[static_cast<size_t>(r * kFeatures + j)], 0);
            }
            if (with_group && j / kGroup == 1) {
              ASSERT_EQ(q[static_cast<size_t>(31 * kFeatures + j)], 0);
            }
          }
          EXPECT_EQ(scales[static_cast<size_t>(5 * groups)], types.least);
          for (int64_t r = 0; r < kRows; ++r) {
            const auto at = static_cast<size_t>(r);
            const double error = RowError(layer, q, r);
            ASSERT_LE(error, certificate.row_bound[at]) << "row " << r;
            ASSERT_LE(certificate.row_error[at], certificate.row_bound[at]) << "row " << r;
            if (r == 5 || r == 22) continue;
            ASSERT_NEAR(certificate.row_error[at], error, 2e-4 * error);
          }
          ASSERT_LE(certificate.linf_probability, 1);
          // Rows are independent: without the small ones the others have the same codes.
          const auto whole = testing::Quantize(usual, spec);
          ASSERT_TRUE(whole.ok()) << whole.status();
          EXPECT_FALSE(whole->certificate.underflow.has_value());
          const auto other = testing::TensorValues(*whole, "weight");
          for (const int64_t r : {0, 4, 6, 21, 39}) {
            for (int64_t j = 0; j < kFeatures; ++j) {
              const auto at = static_cast<size_t>(r * kFeatures + j);
              ASSERT_EQ(q[at], other[at]) << "row " << r;
            }
          }
        }
      }
    }
  }
}

// Dense half formats: scales of float32 hold what their levels do not.
TEST(UnderflowTest, CountsLevelsThatRoundToZero) {
  const struct {
    Format format;
    double size;
  } kFormats[] = {{Format::kDenseF16, 1e-9}, {Format::kDenseBF16, 1e-43}};
  for (const auto& [format, size] : kFormats) {
    const RandomLayer layer = LayerWithSmallWeights(size, 73);
    ResolvedSpec spec;
    spec.format = format;
    const auto result = testing::Quantize(layer, spec);
    ASSERT_TRUE(result.ok()) << result.status();
    ASSERT_TRUE(result->certificate.underflow.has_value());
    EXPECT_EQ(result->certificate.underflow->first_rows, (std::vector<int64_t>{5, 22}));
    const auto q = testing::TensorValues(*result, "weight");
    for (int64_t j = 0; j < kFeatures; ++j) {
      EXPECT_EQ(q[static_cast<size_t>(5 * kFeatures + j)], 0);
      EXPECT_NE(q[static_cast<size_t>(4 * kFeatures + j)] == 0 &&
                    q[static_cast<size_t>(3 * kFeatures + j)] == 0,
                true);
    }
  }
}

// Packed, the codes are the zero point: 2^(b-1) in every word.
TEST(UnderflowTest, PackedFormatsHoldTheZeroPoint) {
  const RandomLayer layer = LayerWithSmallWeights(1e-9, 77);
  for (const Format format : {Format::kGptq, Format::kGptqV2, Format::kCompressedTensors}) {
    ResolvedSpec spec;
    spec.format = format;
    spec.scale_dtype = DType::kF16;
    const auto result = testing::Quantize(layer, spec);
    ASSERT_TRUE(result.ok()) << result.status();
    const bool gptq = format != Format::kCompressedTensors;
    const auto scales = testing::TensorValues(*result, gptq ? "scales" : "weight_scale");
    const ResultTensor& packed = result->tensors.front();
    ASSERT_EQ(packed.role, gptq ? "qweight" : "weight_packed");
    std::vector<uint32_t> words(packed.bytes.size() / 4);
    std::memcpy(words.data(), packed.bytes.data(), packed.bytes.size());
    constexpr int64_t kWords = kFeatures * 4 / 32;
    for (int64_t w = 0; w < kWords; ++w) {
      EXPECT_EQ(words[static_cast<size_t>(gptq ? w * kRows + 5 : 5 * kWords + w)], 0x88888888u);
    }
    EXPECT_EQ(scales[5], 0x1p-14);
  }
}

// A row that a coarse scale still holds keeps its levels, and rows of exact zeros lose nothing.
TEST(UnderflowTest, CountsOnlyWhatIsLost) {
  RandomLayer layer = LayerWithSmallWeights(1e-6, 79);
  for (int64_t j = 0; j < kFeatures; ++j) layer.w(9, j) = 0;
  ResolvedSpec spec;
  spec.scale_dtype = DType::kF16;
  const auto result = testing::Quantize(layer, spec);
  ASSERT_TRUE(result.ok()) << result.status();
  EXPECT_FALSE(result->certificate.underflow.has_value());
  EXPECT_FALSE(Warns(result->certificate, "too small"));
  const auto q = testing::TensorValues(*result, "weight");
  double kept = 0;
  for (int64_t j = 0; j < kFeatures; ++j)
    kept += std::abs(q[static_cast<size_t>(5 * kFeatures + j)]);
  EXPECT_GT(kept, 0);
}

// Many rows: all are counted, the first are named.
TEST(UnderflowTest, NamesTheFirstRows) {
  RandomLayer layer = testing::MakeLayer(100, 24, 60, Inputs::kGaussian, 83);
  for (double& w : layer.w.values) w = static_cast<float>(w * 1e-9);
  for (int64_t j = 0; j < 24; ++j) layer.w(0, j) = 1;
  ResolvedSpec spec;
  spec.scale_dtype = DType::kF16;
  spec.group_size = 8;
  const auto result = testing::Quantize(layer, spec);
  ASSERT_TRUE(result.ok()) << result.status();
  const Underflow& underflow = *result->certificate.underflow;
  EXPECT_EQ(underflow.groups, 59 * 3);
  EXPECT_EQ(underflow.rows, 59);
  ASSERT_EQ(underflow.first_rows.size(), 16U);
  for (int64_t i = 0; i < 16; ++i) EXPECT_EQ(underflow.first_rows[static_cast<size_t>(i)], i + 1);
  EXPECT_TRUE(Warns(result->certificate, "177 of 180"));
}

// Too large: refused with row, column and value, also where damping is searched for on some rows.
TEST(OverflowTest, NamesRowColumnAndValue) {
  for (const Method method : {Method::kNearest, Method::kOptq, Method::kQronos}) {
    for (const int64_t group : {int64_t{0}, kGroup}) {
      for (const bool search : {false, true}) {
        RandomLayer layer = testing::MakeLayer(200, kFeatures, 700, Inputs::kCorrelated, 89);
        layer.held_x = layer.x;
        layer.w(601, 40) = -1e6;
        ResolvedSpec spec;
        spec.method = method;
        spec.scale_dtype = DType::kF16;
        spec.group_size = group;
        spec.damping_rule = search ? DampingRule::kHeldOut : DampingRule::kRelativeTrace;
        const auto result = testing::Quantize(layer, spec);
        EXPECT_EQ(result.status().code(), absl::StatusCode::kInvalidArgument);
        EXPECT_EQ(base::FieldOf(result.status()), "spec.scale_dtype");
        const std::string text(result.status().message());
        for (const char* part : {"row 601", "column 40", "-1e+06", "F16"}) {
          EXPECT_NE(text.find(part), std::string::npos) << text;
        }
        EXPECT_EQ(text.find("group 1") != std::string::npos, group != 0) << text;
      }
    }
  }
}

// Levels that pass a half type's range: the row of the layer, not that of the search's sample.
TEST(OverflowTest, NamesTheRowWhoseLevelsPassTheirType) {
  RandomLayer layer = testing::MakeLayer(200, kFeatures, 700, Inputs::kCorrelated, 97);
  layer.held_x = layer.x;
  for (int64_t j = 0; j < kFeatures; ++j) layer.w(699, j) = 1e6;
  for (const auto& [method, search] :
       {std::pair(Method::kNearest, false), {Method::kOptq, false}, {Method::kOptq, true}}) {
    ResolvedSpec spec;
    spec.method = method;
    spec.format = Format::kDenseF16;
    if (search) spec.damping_rule = DampingRule::kHeldOut;
    const auto result = testing::Quantize(layer, spec);
    EXPECT_EQ(result.status().code(), absl::StatusCode::kInvalidArgument);
    EXPECT_EQ(base::FieldOf(result.status()), "weight");
    EXPECT_NE(std::string(result.status().message()).find("row 699 "), std::string::npos)
        << result.status();
  }
}

}  // namespace
}  // namespace certiq::engine
