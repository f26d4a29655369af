#include "tests/engine/problems.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <random>
#include <string>
#include <thread>
#include <utility>

#include "tests/engine/specs.h"

namespace certiq::testing {
namespace {

std::vector<float> Floats(const textbook::Matrix& m) {
  return std::vector<float>(m.values.begin(), m.values.end());
}

}  // namespace

void ContraryExecutor::ParallelFor(int64_t count, const std::function<void(int64_t)>& body) {
  constexpr int64_t kThreads = 3;
  std::vector<std::jthread> threads;
  for (int64_t t = 0; t < kThreads; ++t) {
    threads.emplace_back([&, t] {
      for (int64_t i = count - 1 - t; i >= 0; i -= kThreads) body(i);
    });
  }
}

RandomLayer MakeLayer(int64_t tokens, int64_t features, int64_t rows, Inputs inputs,
                      uint64_t seed) {
  std::mt19937_64 random(seed);
  std::normal_distribution<double> gauss;
  RandomLayer layer;
  layer.x = textbook::Matrix(tokens, features);
  layer.w = textbook::Matrix(rows, features);
  for (double& v : layer.x.values) v = gauss(random);
  for (double& v : layer.w.values) v = static_cast<float>(0.05 * gauss(random));
  for (int64_t t = 0; t < tokens; ++t) {
    for (int64_t j = 0; j < features; ++j) {
      double& v = layer.x(t, j);
      switch (inputs) {
        case Inputs::kGaussian:
          break;
        case Inputs::kCorrelated:
          if (j > 0) v = 0.3 * v + 0.9 * layer.x(t, j - 1);
          break;
        case Inputs::kRankDeficient:
          if (t >= tokens / 2) v = layer.x(t - tokens / 2, j);
          if (j % 2 == 1) v = 2 * layer.x(t, j - 1);
          break;
        case Inputs::kIllConditioned:
          v *= std::pow(10.0, static_cast<double>(j % 7) - 3);
          if (t == 0) v *= 1000;
          break;
      }
      v = static_cast<float>(v);
    }
  }
  return layer;
}

textbook::Matrix Disturbed(const textbook::Matrix& x, double share, uint64_t seed) {
  std::mt19937_64 random(seed);
  std::normal_distribution<double> gauss;
  textbook::Matrix result = x;
  for (int64_t t = 0; t < x.rows; ++t) {
    const double drift = gauss(random);
    for (int64_t j = 0; j < x.cols; ++j) {
      result(t, j) = static_cast<float>(x(t, j) + share * (gauss(random) + 0.5 * drift));
    }
  }
  return result;
}

engine::Statistics AccumulatePair(const textbook::Matrix& x, const textbook::Matrix& x_quantized) {
  engine::SerialExecutor executor;
  engine::StatisticsAccumulator sums(x.cols, true);
  const std::vector<float> a = Floats(x);
  const std::vector<float> b = Floats(x_quantized);
  const absl::Status status = sums.AppendPair(
      {engine::DType::kF32, reinterpret_cast<const std::byte*>(a.data()), "x"},
      {engine::DType::kF32, reinterpret_cast<const std::byte*>(b.data()), "x_quantized"}, 0, x.rows,
      executor);
  if (!status.ok()) std::abort();
  return std::move(sums).Finish(executor);
}

engine::Statistics Accumulate(const textbook::Matrix& x, int64_t chunk) {
  engine::SerialExecutor executor;
  engine::StatisticsAccumulator sums(x.cols);
  const std::vector<float> values = Floats(x);
  for (int64_t t = 0; t < x.rows; t += chunk) {
    const absl::Status status = sums.Append(
        {engine::DType::kF32, reinterpret_cast<const std::byte*>(values.data() + t * x.cols), "x"},
        t, std::min(chunk, x.rows - t), executor);
    if (!status.ok()) std::abort();
  }
  return std::move(sums).Finish(executor);
}

engine::StripMatrix Strips(const textbook::Matrix& w) {
  engine::StripMatrix strips(w.rows, w.cols);
  const std::vector<float> values = Floats(w);
  for (int64_t r = 0; r < w.rows; ++r) strips.SetRow(r, values.data() + r * w.cols);
  return strips;
}

absl::StatusOr<engine::QuantizedLayer> Quantize(const RandomLayer& layer,
                                                const engine::ResolvedSpec& spec,
                                                engine::Executor* executor) {
  engine::SerialExecutor serial;
  engine::RunContext context;
  context.executor = executor == nullptr ? &serial : executor;
  const auto sums = [](const textbook::Matrix& x, const textbook::Matrix& x_quantized) {
    return std::make_shared<const engine::Statistics>(
        x_quantized.rows > 0 ? AccumulatePair(x, x_quantized) : Accumulate(x));
  };
  engine::LayerProblem problem{Completed(spec), Strips(layer.w), sums(layer.x, layer.x_quantized)};
  if (layer.held_x.rows > 0) problem.held_out = sums(layer.held_x, layer.held_x_quantized);
  return engine::QuantizeLayer(std::move(problem), context);
}

std::vector<double> TensorValues(const engine::QuantizedLayer& layer, const char* role) {
  for (const engine::ResultTensor& tensor : layer.tensors) {
    if (tensor.role != role) continue;
    std::vector<float> values(tensor.bytes.size() /
                              static_cast<size_t>(engine::ItemSize(tensor.dtype)));
    engine::DecodeToFloat(tensor.dtype, tensor.bytes.data(), static_cast<int64_t>(values.size()),
                          values.data());
    return {values.begin(), values.end()};
  }
  return {};
}

std::vector<double> Row(const textbook::Matrix& m, int64_t r) {
  return {m.values.begin() + r * m.cols, m.values.begin() + (r + 1) * m.cols};
}

}  // namespace certiq::testing
