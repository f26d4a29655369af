#include "engine/packing.h"

#include <cstring>
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

}  // namespace

std::vector<ResultTensor> PackDense(const ResolvedSpec& spec, const Grid& grid,
                                    const std::vector<uint8_t>& codes, int64_t features) {
  ResultTensor weight{"weight", DType::kF32, {grid.rows, features}, {}};
  weight.bytes.resize(codes.size() * sizeof(float));
  std::vector<float> levels(static_cast<size_t>(features));
  for (int64_t r = 0; r < grid.rows; ++r) {
    for (int64_t j = 0; j < features; ++j) {
      const auto at = static_cast<size_t>(r * grid.groups + spec.GroupOf(j));
      const int32_t code = codes[static_cast<size_t>(r * features + j)];
      levels[static_cast<size_t>(j)] = grid.scale[at] * static_cast<float>(code - grid.zero[at]);
    }
    std::memcpy(weight.bytes.data() + r * features * static_cast<int64_t>(sizeof(float)),
                levels.data(), levels.size() * sizeof(float));
  }

  std::vector<ResultTensor> tensors;
  tensors.push_back(std::move(weight));
  tensors.push_back(MakeTensor("scales", DType::kF32, {grid.rows, grid.groups}, grid.scale));
  if (!spec.symmetric) {
    tensors.push_back(MakeTensor("zeros", DType::kI32, {grid.rows, grid.groups}, grid.zero));
  }
  if (spec.group_size != 0) {
    std::vector<int32_t> group_of(static_cast<size_t>(features));
    for (int64_t j = 0; j < features; ++j) {
      group_of[static_cast<size_t>(j)] = static_cast<int32_t>(spec.GroupOf(j));
    }
    tensors.push_back(MakeTensor("g_idx", DType::kI32, {features}, group_of));
  }
  return tensors;
}

double BitsPerWeight(const ResolvedSpec& spec, const Grid& grid, int64_t features) {
  const double per_group =
      8.0 * static_cast<double>(ItemSize(spec.scale_dtype)) + (spec.symmetric ? 0 : spec.bits);
  return spec.bits + per_group * static_cast<double>(grid.groups) / static_cast<double>(features);
}

}  // namespace certiq::engine
