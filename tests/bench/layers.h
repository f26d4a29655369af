// Layers to measure on: of any size, the same every time.

#ifndef CERTIQ_TESTS_BENCH_LAYERS_H_
#define CERTIQ_TESTS_BENCH_LAYERS_H_

#include <cstddef>
#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "engine/quantize_layer.h"

namespace certiq::bench {

struct Shape {
  int64_t rows = 0;
  int64_t features = 0;
};

// "ROWSxFEATURES", both at least 1; none from anything else.
std::optional<Shape> ParseShape(const std::string& text);

// Activations [tokens, features] as binary16: a few directions that all features share, noise, and
// features of very different size, as in a transformer.
std::vector<std::byte> Activations(int64_t tokens, int64_t features, uint64_t seed);

// The same with a little noise, as earlier quantization leaves it.
std::vector<std::byte> Disturbed(const std::vector<std::byte>& activations, uint64_t seed);

// Weights [rows, features] of a normal distribution.
engine::StripMatrix Weights(const Shape& shape, uint64_t seed);

}  // namespace certiq::bench

#endif  // CERTIQ_TESTS_BENCH_LAYERS_H_
