#include "engine/export/packing.h"

#include <algorithm>
#include <cstring>
#include <functional>
#include <utility>

namespace certiq::engine {
namespace {

template <typename T>
ResultTensor MakeTensor(std::string role, DType dtype, std::vector<int64_t> shape,
                        const std::vector<T>& values) {
  ResultTensor tensor{std::move(role), dtype, std::move(shape), {}};
  tensor.bytes.resize(values.size() * sizeof(T));
  std::memcpy(tensor.bytes.data(), values.data(), tensor.bytes.size());
  return tensor;
}

ResultTensor GroupIndex(const char* role, const Grid& grid) {
  return MakeTensor(role, DType::kI32, {static_cast<int64_t>(grid.group_of.size())}, grid.group_of);
}

// Values in the half type, or as they are in float32.
ResultTensor Rounded(const char* role, DType dtype, std::vector<int64_t> shape,
                     const std::vector<float>& values) {
  if (dtype == DType::kF32) return MakeTensor(role, dtype, std::move(shape), values);
  std::vector<uint16_t> bits;
  bits.reserve(values.size());
  for (const float value : values) bits.push_back(HalfBits(dtype, value));
  return MakeTensor(role, dtype, std::move(shape), bits);
}

// Rows a task packs.
constexpr int64_t kPieceRows = 16;

// Runs body(r) for every row.
void ForRows(int64_t rows, Executor& executor, const std::function<void(int64_t)>& body) {
  executor.ParallelFor((rows + kPieceRows - 1) / kPieceRows, [&](int64_t piece) {
    const int64_t last = std::min(rows, (piece + 1) * kPieceRows);
    for (int64_t r = piece * kPieceRows; r < last; ++r) body(r);
  });
}

// The levels of a row's codes, before they are rounded to the level type.
void LevelsOfRow(const Grid& grid, int64_t row, const uint8_t* codes, int64_t features,
                 float* levels) {
  for (int64_t j = 0; j < features;) {
    // One scale for a run of features of one group.
    const int32_t group = grid.group_of[static_cast<size_t>(j)];
    int64_t end = j + 1;
    while (end < features && grid.group_of[static_cast<size_t>(end)] == group) ++end;
    const size_t at = grid.At(row, j);
    const float scale = grid.scale[at];
    const int32_t zero = grid.zero[at];
    for (; j < end; ++j) levels[j] = scale * static_cast<float>(codes[j] - zero);
  }
}

std::vector<ResultTensor> PackDense(const ResolvedSpec& spec, const Grid& grid,
                                    const UnsetVector<uint8_t>& codes, int64_t features,
                                    Executor& executor) {
  const DType dtype = grid.level_type;
  const int64_t row_bytes = features * ItemSize(dtype);
  ResultTensor weight{"weight", dtype, {grid.rows, features}, {}};
  weight.bytes.resize(static_cast<size_t>(grid.rows * row_bytes));
  ForRows(grid.rows, executor, [&](int64_t r) {
    std::vector<float> levels(static_cast<size_t>(features));
    LevelsOfRow(grid, r, codes.data() + r * features, features, levels.data());
    std::byte* to = weight.bytes.data() + r * row_bytes;
    if (dtype == DType::kF32) {
      std::memcpy(to, levels.data(), static_cast<size_t>(row_bytes));
      return;
    }
    for (const float level : levels) {
      const uint16_t bits = HalfBits(dtype, level);
      std::memcpy(to, &bits, sizeof(bits));
      to += sizeof(bits);
    }
  });
  std::vector<ResultTensor> tensors;
  tensors.push_back(std::move(weight));
  tensors.push_back(MakeTensor("scales", DType::kF32, {grid.rows, grid.groups}, grid.scale));
  if (!spec.symmetric) {
    tensors.push_back(MakeTensor("zeros", DType::kI32, {grid.rows, grid.groups}, grid.zero));
  }
  if (spec.group_size != 0) tensors.push_back(GroupIndex("g_idx", grid));
  return tensors;
}

// Element (i, j) of a [rows, cols] row-major vector goes to (j, i).
template <typename T>
std::vector<T> Transposed(const std::vector<T>& values, int64_t rows, int64_t cols) {
  std::vector<T> result(values.size());
  for (int64_t i = 0; i < rows; ++i) {
    for (int64_t j = 0; j < cols; ++j) {
      result[static_cast<size_t>(j * rows + i)] = values[static_cast<size_t>(i * cols + j)];
    }
  }
  return result;
}

// The zero points of group g along the output channels, less `offset`.
std::vector<uint8_t> ZerosOfGroup(const Grid& grid, int64_t g, int32_t offset) {
  std::vector<uint8_t> zeros;
  for (int64_t r = 0; r < grid.rows; ++r) {
    zeros.push_back(
        static_cast<uint8_t>(grid.zero[static_cast<size_t>(r * grid.groups + g)] - offset));
  }
  return zeros;
}

// `count` values as a stream of bits; `words` is zero.
void PackInto(const uint8_t* values, int64_t count, int32_t bits, uint32_t* words) {
  for (int64_t i = 0; i < count; ++i) {
    const int64_t bit = i * bits;
    const uint64_t shifted = static_cast<uint64_t>(values[i]) << (bit % 32);
    words[bit / 32] |= static_cast<uint32_t>(shifted);
    // A value may straddle two words.
    if (shifted >> 32 != 0) words[bit / 32 + 1] |= static_cast<uint32_t>(shifted >> 32);
  }
}

int64_t WordsFor(int64_t count, int32_t bits) { return (count * bits + 31) / 32; }

std::vector<uint32_t> PackRows(const UnsetVector<uint8_t>& codes, int32_t bits, int64_t rows,
                               int64_t features, Executor& executor) {
  const int64_t words_a_row = WordsFor(features, bits);
  std::vector<uint32_t> words(static_cast<size_t>(rows * words_a_row));
  ForRows(rows, executor, [&](int64_t r) {
    PackInto(codes.data() + r * features, features, bits, words.data() + r * words_a_row);
  });
  return words;
}

std::vector<ResultTensor> PackGptq(const ResolvedSpec& spec, const Grid& grid,
                                   const UnsetVector<uint8_t>& codes, int64_t features,
                                   Executor& executor) {
  const std::vector<uint32_t> words = PackRows(codes, spec.bits, grid.rows, features, executor);
  const int64_t words_a_row = features * spec.bits / 32;
  std::vector<uint32_t> zeros;
  for (int64_t g = 0; g < grid.groups; ++g) {
    const std::vector<uint32_t> row =
        PackBits(ZerosOfGroup(grid, g, spec.format == Format::kGptq ? 1 : 0), spec.bits);
    zeros.insert(zeros.end(), row.begin(), row.end());
  }
  std::vector<ResultTensor> tensors;
  tensors.push_back(MakeTensor("qweight", DType::kI32, {words_a_row, grid.rows},
                               Transposed(words, grid.rows, words_a_row)));
  tensors.push_back(
      MakeTensor("qzeros", DType::kI32, {grid.groups, grid.rows * spec.bits / 32}, zeros));
  tensors.push_back(Rounded("scales", DType::kF16, {grid.groups, grid.rows},
                            Transposed(grid.scale, grid.rows, grid.groups)));
  tensors.push_back(GroupIndex("g_idx", grid));
  return tensors;
}

std::vector<ResultTensor> PackCompressed(const ResolvedSpec& spec, const Grid& grid,
                                         const UnsetVector<uint8_t>& codes, int64_t features,
                                         Executor& executor) {
  const int64_t words_a_row = (features * spec.bits + 31) / 32;
  std::vector<ResultTensor> tensors;
  tensors.push_back(MakeTensor("weight_packed", DType::kI32, {grid.rows, words_a_row},
                               PackRows(codes, spec.bits, grid.rows, features, executor)));
  tensors.push_back(
      Rounded("weight_scale", spec.scale_dtype, {grid.rows, grid.groups}, grid.scale));
  tensors.push_back(MakeTensor<int64_t>("weight_shape", DType::kI64, {2}, {grid.rows, features}));
  if (!spec.symmetric) {
    const int64_t words_a_group = (grid.rows * spec.bits + 31) / 32;
    std::vector<uint32_t> zeros;
    for (int64_t g = 0; g < grid.groups; ++g) {
      const std::vector<uint32_t> column = PackBits(ZerosOfGroup(grid, g, 0), spec.bits);
      zeros.insert(zeros.end(), column.begin(), column.end());
    }
    tensors.push_back(MakeTensor("weight_zero_point", DType::kI32, {words_a_group, grid.groups},
                                 Transposed(zeros, grid.groups, words_a_group)));
  }
  const bool ordered_groups = spec.group_size != 0 && spec.order != Order::kNatural &&
                              spec.group_scales == GroupScales::kDynamic;
  if (ordered_groups) tensors.push_back(GroupIndex("weight_g_idx", grid));
  return tensors;
}

}  // namespace

std::vector<uint32_t> PackBits(const std::vector<uint8_t>& values, int32_t bits) {
  const auto count = static_cast<int64_t>(values.size());
  std::vector<uint32_t> words(static_cast<size_t>(WordsFor(count, bits)));
  PackInto(values.data(), count, bits, words.data());
  return words;
}

std::vector<ResultTensor> PackResult(const ResolvedSpec& spec, const Grid& grid,
                                     const UnsetVector<uint8_t>& codes, int64_t features,
                                     Executor& executor) {
  switch (spec.format) {
    case Format::kDenseF32:
    case Format::kDenseF16:
    case Format::kDenseBF16:
      return PackDense(spec, grid, codes, features, executor);
    case Format::kGptq:
    case Format::kGptqV2:
      return PackGptq(spec, grid, codes, features, executor);
    case Format::kCompressedTensors:
      return PackCompressed(spec, grid, codes, features, executor);
  }
  return {};
}

double BitsPerWeight(const ResolvedSpec& spec, const Grid& grid, int64_t features) {
  const double per_group =
      8.0 * static_cast<double>(ItemSize(spec.scale_dtype)) + (spec.symmetric ? 0 : spec.bits);
  return spec.bits + per_group * static_cast<double>(grid.groups) / static_cast<double>(features);
}

}  // namespace certiq::engine
