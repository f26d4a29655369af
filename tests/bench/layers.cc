#include "tests/bench/layers.h"

#include <cmath>
#include <cstring>
#include <iterator>

#include "absl/strings/numbers.h"
#include "absl/strings/str_split.h"

namespace certiq::bench {
namespace {

// splitmix64.
class Generator {
 public:
  explicit Generator(uint64_t seed) : state_(seed) {}

  // Mean 0, variance 1; a sum of four uniform numbers is normal enough.
  float Normal() {
    const uint64_t bits = Next();
    float sum = 0;
    for (int i = 0; i < 4; ++i) sum += static_cast<float>((bits >> (16 * i)) & 0xffff);
    return (sum * 0x1p-16f - 2.0f) * 1.7320508f;
  }

 private:
  uint64_t Next() {
    state_ += 0x9e3779b97f4a7c15u;
    uint64_t z = state_;
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
    return z ^ (z >> 31);
  }

  uint64_t state_;
};

constexpr int64_t kDirections = 8;

}  // namespace

std::optional<Shape> ParseShape(const std::string& text) {
  int64_t sides[2] = {};
  const std::vector<std::string> parts = absl::StrSplit(text, 'x');
  if (parts.size() != std::size(sides)) return std::nullopt;
  for (size_t i = 0; i < parts.size(); ++i) {
    if (!absl::SimpleAtoi(parts[i], &sides[i]) || sides[i] < 1) return std::nullopt;
  }
  return Shape{sides[0], sides[1]};
}

std::vector<std::byte> Activations(int64_t tokens, int64_t features, uint64_t seed) {
  Generator random(seed);
  std::vector<float> directions(static_cast<size_t>(kDirections * features));
  for (float& value : directions) value = random.Normal();
  std::vector<float> size(static_cast<size_t>(features));
  for (float& value : size) value = std::exp2(random.Normal());
  std::vector<std::byte> bytes(static_cast<size_t>(tokens * features) * sizeof(uint16_t));
  std::byte* to = bytes.data();
  for (int64_t t = 0; t < tokens; ++t) {
    float share[kDirections];
    for (float& value : share) value = random.Normal();
    for (int64_t j = 0; j < features; ++j) {
      float value = random.Normal();
      for (int64_t k = 0; k < kDirections; ++k) {
        value += 0.5f * share[k] * directions[static_cast<size_t>(k * features + j)];
      }
      const uint16_t bits =
          engine::HalfBits(engine::DType::kF16, value * size[static_cast<size_t>(j)]);
      std::memcpy(to, &bits, sizeof(bits));
      to += sizeof(bits);
    }
  }
  return bytes;
}

std::vector<std::byte> Disturbed(const std::vector<std::byte>& activations, uint64_t seed) {
  Generator random(seed);
  const auto count = static_cast<int64_t>(activations.size() / sizeof(uint16_t));
  std::vector<float> values(static_cast<size_t>(count));
  engine::DecodeToFloat(engine::DType::kF16, activations.data(), count, values.data());
  std::vector<std::byte> bytes(activations.size());
  for (size_t i = 0; i < values.size(); ++i) {
    const uint16_t bits =
        engine::HalfBits(engine::DType::kF16, values[i] * (1 + 0.05f * random.Normal()));
    std::memcpy(bytes.data() + i * sizeof(bits), &bits, sizeof(bits));
  }
  return bytes;
}

engine::StripMatrix Weights(const Shape& shape, uint64_t seed) {
  Generator random(seed);
  engine::StripMatrix weights(shape.rows, shape.features);
  std::vector<float> row(static_cast<size_t>(shape.features));
  for (int64_t r = 0; r < shape.rows; ++r) {
    for (float& value : row) value = 0.02f * random.Normal();
    weights.SetRow(r, row.data());
  }
  return weights;
}

}  // namespace certiq::bench
