// Layouts against a reader written from their description.

#include "engine/export/packing.h"

#include <gtest/gtest.h>

#include <cmath>
#include <cstring>

#include "tests/engine/problems.h"

namespace certiq::engine {
namespace {

using testing::Inputs;
using testing::MakeLayer;
using testing::RandomLayer;

const ResultTensor& Find(const QuantizedLayer& layer, const std::string& role) {
  for (const ResultTensor& tensor : layer.tensors) {
    if (tensor.role == role) return tensor;
  }
  ADD_FAILURE() << "no tensor " << role;
  return layer.tensors.front();
}

std::vector<uint32_t> Words(const ResultTensor& tensor) {
  std::vector<uint32_t> words(tensor.bytes.size() / 4);
  std::memcpy(words.data(), tensor.bytes.data(), tensor.bytes.size());
  return words;
}

// Value i of a bit stream, bit by bit.
int ReadBits(const std::vector<uint32_t>& words, int64_t i, int bits) {
  int value = 0;
  for (int b = 0; b < bits; ++b) {
    const int64_t bit = i * bits + b;
    value |= static_cast<int>((words[static_cast<size_t>(bit / 32)] >> (bit % 32)) & 1) << b;
  }
  return value;
}

TEST(PackingTest, BitStreamsStraddleWords) {
  const std::vector<uint8_t> values{7, 0, 5, 3, 1, 6, 2, 4, 7, 7, 5};
  const std::vector<uint32_t> words = PackBits(values, 3);
  ASSERT_EQ(words.size(), 2u);
  for (size_t i = 0; i < values.size(); ++i) {
    EXPECT_EQ(ReadBits(words, static_cast<int64_t>(i), 3), values[i]);
  }
}

struct Case {
  int bits;
  bool symmetric;
  int group;
  bool ordered;
  bool dynamic;
};

class PackedFormats : public ::testing::TestWithParam<Case> {
 protected:
  static constexpr int64_t kRows = 32;
  static constexpr int64_t kFeatures = 64;

  ResolvedSpec Spec(Format format) const {
    ResolvedSpec spec;
    spec.bits = GetParam().bits;
    spec.symmetric = GetParam().symmetric;
    spec.group_size = GetParam().group;
    spec.scale_dtype = DType::kF16;
    spec.format = format;
    if (GetParam().ordered) spec.order = Order::kDecreasingNorm;
    if (GetParam().dynamic) spec.group_scales = GroupScales::kDynamic;
    return spec;
  }
  RandomLayer problem_ = MakeLayer(200, kFeatures, kRows, Inputs::kIllConditioned, 373);
};

TEST_P(PackedFormats, GptqUnpacksToTheDenseWeights) {
  const auto dense = testing::Quantize(problem_, Spec(Format::kDenseF32));
  ASSERT_TRUE(dense.ok()) << dense.status();
  const auto weight = testing::TensorValues(*dense, "weight");
  for (const Format format : {Format::kGptq, Format::kGptqV2}) {
    if (format == Format::kGptq && !GetParam().symmetric) continue;
    const auto packed = testing::Quantize(problem_, Spec(format));
    ASSERT_TRUE(packed.ok()) << packed.status();
    const ResultTensor& qweight = Find(*packed, "qweight");
    const ResultTensor& qzeros = Find(*packed, "qzeros");
    const auto scales = testing::TensorValues(*packed, "scales");
    const auto g_idx = testing::TensorValues(*packed, "g_idx");
    const int bits = GetParam().bits;
    const int64_t groups = Find(*packed, "scales").shape[0];
    ASSERT_EQ(qweight.shape, (std::vector<int64_t>{kFeatures * bits / 32, kRows}));
    ASSERT_EQ(qzeros.shape, (std::vector<int64_t>{groups, kRows * bits / 32}));
    ASSERT_EQ(Find(*packed, "scales").dtype, DType::kF16);
    ASSERT_EQ(g_idx.size(), static_cast<size_t>(kFeatures));
    const auto words = Words(qweight);
    const auto zero_words = Words(qzeros);
    for (int64_t n = 0; n < kRows; ++n) {
      std::vector<uint32_t> column;
      for (int64_t w = 0; w < qweight.shape[0]; ++w) column.push_back(words[w * kRows + n]);
      for (int64_t k = 0; k < kFeatures; ++k) {
        const auto g = static_cast<int64_t>(g_idx[static_cast<size_t>(k)]);
        const std::vector<uint32_t> zeros(zero_words.begin() + g * qzeros.shape[1],
                                          zero_words.begin() + (g + 1) * qzeros.shape[1]);
        const int zero = ReadBits(zeros, n, bits) + (format == Format::kGptq ? 1 : 0);
        const double value =
            scales[static_cast<size_t>(g * kRows + n)] * (ReadBits(column, k, bits) - zero);
        ASSERT_EQ(static_cast<float>(value),
                  static_cast<float>(weight[static_cast<size_t>(n * kFeatures + k)]));
      }
    }
  }
}

TEST_P(PackedFormats, CompressedTensorsUnpacksToTheDenseWeights) {
  const int bits = GetParam().bits;
  const auto dense = testing::Quantize(problem_, Spec(Format::kDenseF32));
  const auto packed = testing::Quantize(problem_, Spec(Format::kCompressedTensors));
  ASSERT_TRUE(dense.ok() && packed.ok()) << packed.status();
  const auto weight = testing::TensorValues(*dense, "weight");
  const auto scales = testing::TensorValues(*packed, "weight_scale");
  const ResultTensor& data = Find(*packed, "weight_packed");
  ASSERT_EQ(data.shape, (std::vector<int64_t>{kRows, (kFeatures * bits + 31) / 32}));
  EXPECT_EQ(testing::TensorValues(*packed, "weight_shape"),
            (std::vector<double>{kRows, kFeatures}));
  const int64_t groups = Find(*packed, "weight_scale").shape[1];
  const bool ordered_groups = GetParam().ordered && GetParam().dynamic && GetParam().group != 0;
  const auto g_idx = testing::TensorValues(*packed, "weight_g_idx");
  ASSERT_EQ(g_idx.size(), ordered_groups ? static_cast<size_t>(kFeatures) : 0u);
  const auto words = Words(data);
  for (int64_t n = 0; n < kRows; ++n) {
    const std::vector<uint32_t> row(words.begin() + n * data.shape[1],
                                    words.begin() + (n + 1) * data.shape[1]);
    for (int64_t k = 0; k < kFeatures; ++k) {
      int64_t g = GetParam().group == 0 ? 0 : k / GetParam().group;
      if (ordered_groups) g = static_cast<int64_t>(g_idx[static_cast<size_t>(k)]);
      int zero = 1 << (bits - 1);
      if (!GetParam().symmetric) {
        const ResultTensor& zeros = Find(*packed, "weight_zero_point");
        const auto zero_words = Words(zeros);
        std::vector<uint32_t> column;
        for (int64_t w = 0; w < zeros.shape[0]; ++w) column.push_back(zero_words[w * groups + g]);
        zero = ReadBits(column, n, bits);
      }
      const double value =
          scales[static_cast<size_t>(n * groups + g)] * (ReadBits(row, k, bits) - zero);
      ASSERT_EQ(static_cast<float>(value),
                static_cast<float>(weight[static_cast<size_t>(n * kFeatures + k)]));
    }
  }
}

INSTANTIATE_TEST_SUITE_P(
    Widths, PackedFormats,
    ::testing::Values(Case{2, true, 0, false, false}, Case{3, true, 16, false, false},
                      Case{4, true, 32, true, true}, Case{8, true, 0, true, false},
                      Case{2, false, 16, true, true}, Case{3, false, 0, false, false},
                      Case{4, false, 16, true, false}, Case{5, false, 32, false, true},
                      Case{8, false, 16, false, false}));

}  // namespace
}  // namespace certiq::engine
