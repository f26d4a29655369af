// Builders and helpers for engine tests.

#ifndef CERTIQ_TESTS_ENGINE_PROBLEMS_H_
#define CERTIQ_TESTS_ENGINE_PROBLEMS_H_

#include <cstdint>
#include <functional>
#include <vector>

#include "absl/status/statusor.h"
#include "engine/quantize_layer.h"
#include "tests/engine/textbook.h"

namespace certiq::testing {

// Runs bodies on three threads of its own, highest index first: whatever
// depends on threads or order shows.
class ContraryExecutor final : public engine::Executor {
 public:
  void ParallelFor(int64_t count, const std::function<void(int64_t)>& body) override;
};

// A random problem. Entries are float32 values held in float64.
struct RandomLayer {
  textbook::Matrix x;  // [tokens, features]
  textbook::Matrix w;  // [rows, features]
  // X~ [tokens, features]; empty: matched inputs.
  textbook::Matrix x_quantized;
  // Held-out tokens; empty: none.
  textbook::Matrix held_x;
  textbook::Matrix held_x_quantized;

  const textbook::Matrix& inputs() const { return x_quantized.rows > 0 ? x_quantized : x; }
};

// How a layer is rounded, for tables of tests.
struct ScaleSetting {
  engine::Method method;
  engine::ScaleRule scale;
  int64_t group_size;
  engine::GroupScales groups;
};

enum class Inputs {
  kGaussian,
  // Neighbouring features correlate strongly.
  kCorrelated,
  // Rank tokens/2 at most: the second half of the tokens repeats the first, features
  // are copies of one another up to noise-free scaling.
  kRankDeficient,
  // Feature norms spread over six decades, one token a thousand times the others.
  kIllConditioned,
};

RandomLayer MakeLayer(int64_t tokens, int64_t features, int64_t rows, Inputs inputs, uint64_t seed);

// X with noise of `share` of its size and a little correlated drift.
textbook::Matrix Disturbed(const textbook::Matrix& x, double share, uint64_t seed);

// Sums of X and X~ through the accumulator.
engine::Statistics AccumulatePair(const textbook::Matrix& x, const textbook::Matrix& x_quantized);

// Sums of x through the accumulator, in pieces of `chunk` rows.
engine::Statistics Accumulate(const textbook::Matrix& x, int64_t chunk = 1000);
engine::StripMatrix Strips(const textbook::Matrix& w);

// Quantizes with the given executor (serial if null).
absl::StatusOr<engine::QuantizedLayer> Quantize(const RandomLayer& layer,
                                                const engine::ResolvedSpec& spec,
                                                engine::Executor* executor = nullptr);

// A tensor of the result by role, as doubles; empty if absent.
std::vector<double> TensorValues(const engine::QuantizedLayer& layer, const char* role);
// Row r of a matrix.
std::vector<double> Row(const textbook::Matrix& m, int64_t r);

}  // namespace certiq::testing

#endif  // CERTIQ_TESTS_ENGINE_PROBLEMS_H_
