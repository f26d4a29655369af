// Layers to quantize, and work for a pool.

#ifndef CERTIQ_TESTS_SUPPORT_LAYERS_H_
#define CERTIQ_TESTS_SUPPORT_LAYERS_H_

#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>
#include <vector>

#include "engine/run_context.h"
#include "job/job_request.h"
#include "runtime/worker_pool.h"
#include "support/gate.h"

namespace certiq::testing {

// Float32 weights [rows, features] and activations [tokens, features].
struct Layer {
  int64_t rows = 0;
  int64_t features = 0;
  int64_t tokens = 0;
  std::vector<float> weights;
  std::vector<float> x;
};

// Normal entries; the same seed gives the same layer.
Layer MakeRandomLayer(int64_t rows, int64_t features, int64_t tokens, uint32_t seed = 1);

// Rows [begin, end) of a matrix of so many columns, as sent.
std::span<const std::byte> RowBytes(const std::vector<float>& matrix, int64_t columns,
                                    int64_t begin, int64_t end);

// A Quantize call that brings the layer's activations.
server::JobRequest LayerRequestFor(const Layer& layer);

// A job that keeps a worker until `gate` opens or it is cancelled. It looks in on the pool all the
// while, so that tasks run. `done` may be empty.
server::WorkerPool::Job MakeBlockingJob(server::WorkerPool& pool, Gate& gate,
                                        std::function<void(absl::Status)> done = {});

}  // namespace certiq::testing

#endif  // CERTIQ_TESTS_SUPPORT_LAYERS_H_
