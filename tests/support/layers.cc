#include "support/layers.h"

#include <atomic>
#include <random>
#include <utility>

namespace certiq::testing {

Layer MakeRandomLayer(int64_t rows, int64_t features, int64_t tokens, uint32_t seed) {
  // mt19937 is the same everywhere; std::normal_distribution is not, which no test minds.
  std::mt19937 generator(seed);
  std::normal_distribution<float> normal;
  Layer layer{rows, features, tokens, {}, {}};
  layer.weights.resize(static_cast<size_t>(rows * features));
  layer.x.resize(static_cast<size_t>(tokens * features));
  for (float& value : layer.weights) value = normal(generator);
  for (float& value : layer.x) value = normal(generator);
  return layer;
}

std::span<const std::byte> RowBytes(const std::vector<float>& matrix, int64_t columns,
                                    int64_t begin, int64_t end) {
  return std::as_bytes(std::span(matrix).subspan(static_cast<size_t>(begin * columns),
                                                 static_cast<size_t>((end - begin) * columns)));
}

server::JobRequest LayerRequestFor(const Layer& layer) {
  server::JobRequest request;
  request.rows = layer.rows;
  request.features = layer.features;
  server::Activations& activations = request.activations.emplace();
  activations.tokens = layer.tokens;
  activations.features = layer.features;
  return request;
}

server::WorkerPool::Job MakeBlockingJob(server::WorkerPool& pool, Gate& gate,
                                        std::function<void(absl::Status)> done) {
  auto cancellation = std::make_shared<engine::Cancellation>();
  return {.cancellation = cancellation,
          .run =
              [&pool, &gate, cancellation] {
                const auto over = [&] { return gate.is_open() || cancellation->cancelled(); };
                while (!over()) {
                  pool.ParallelFor(2, [&](int64_t /*piece*/) {
                    if (!over()) gate.Wait(std::chrono::milliseconds(1));
                  });
                }
                return cancellation->status();
              },
          .done = done ? std::move(done) : [](const absl::Status& /*status*/) {}};
}

}  // namespace certiq::testing
