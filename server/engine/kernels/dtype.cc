#include "engine/kernels/dtype.h"

#include <Eigen/Core>
#include <algorithm>
#include <bit>
#include <cstring>
#include <iterator>

namespace certiq::engine {
namespace {

// binary16 to binary32. Moving exponent and mantissa into place leaves a float
// too small by 2^112 (the difference of the biases); the multiplication
// is exact, subnormals included. Branch-free, so it vectorises everywhere.
inline float FloatFromHalf(uint16_t half) {
  const uint32_t magnitude = half & 0x7fffu;
  const uint32_t sign = static_cast<uint32_t>(half & 0x8000u) << 16;
  const float scaled = std::bit_cast<float>(magnitude << 13) * 0x1p112f;
  const uint32_t special = magnitude >= 0x7c00u ? 0x7f800000u : 0u;
  return std::bit_cast<float>(std::bit_cast<uint32_t>(scaled) | special | sign);
}

inline float FloatFromBfloat16(uint16_t bits) {
  return std::bit_cast<float>(static_cast<uint32_t>(bits) << 16);
}

inline bool IsNonFinite(float value) {
  return (std::bit_cast<uint32_t>(value) & 0x7f800000u) == 0x7f800000u;
}

template <typename Stored, typename Convert>
int64_t Decode(const std::byte* bytes, int64_t count, float* out, Convert convert) {
  uint32_t bad = 0;
  for (int64_t i = 0; i < count; ++i) {
    Stored stored;
    std::memcpy(&stored, bytes + i * static_cast<int64_t>(sizeof(Stored)), sizeof(Stored));
    out[i] = convert(stored);
    bad |= IsNonFinite(out[i]) ? 1u : 0u;
  }
  if (bad == 0) return -1;
  for (int64_t i = 0; i < count; ++i) {
    if (IsNonFinite(out[i])) return i;
  }
  return -1;
}

// Index of the first element whose `exponent` bits are all set, or -1.
template <typename Stored>
int64_t FindExponent(const std::byte* bytes, int64_t count, Stored exponent) {
  constexpr int64_t kPiece = 4096;
  const auto load = [bytes](int64_t i) {
    Stored stored;
    std::memcpy(&stored, bytes + i * static_cast<int64_t>(sizeof(Stored)), sizeof(Stored));
    return stored;
  };
  for (int64_t begin = 0; begin < count; begin += kPiece) {
    const int64_t end = std::min(count, begin + kPiece);
    Stored bad = 0;
    for (int64_t i = begin; i < end; ++i) {
      bad = static_cast<Stored>(bad | ((load(i) & exponent) == exponent ? 1 : 0));
    }
    for (int64_t i = begin; bad != 0 && i < end; ++i) {
      if ((load(i) & exponent) == exponent) return i;
    }
  }
  return -1;
}

}  // namespace

int64_t ItemSize(DType dtype) {
  switch (dtype) {
    case DType::kF64:
    case DType::kI64:
      return 8;
    case DType::kF32:
    case DType::kI32:
      return 4;
    case DType::kF16:
    case DType::kBF16:
      return 2;
    case DType::kU8:
      return 1;
  }
  return 0;
}

const char* Name(DType dtype) {
  switch (dtype) {
    case DType::kF64:
      return "F64";
    case DType::kF32:
      return "F32";
    case DType::kF16:
      return "F16";
    case DType::kBF16:
      return "BF16";
    case DType::kI64:
      return "I64";
    case DType::kI32:
      return "I32";
    case DType::kU8:
      return "U8";
  }
  return "?";
}

bool IsFloating(DType dtype) {
  return dtype == DType::kF64 || dtype == DType::kF32 || dtype == DType::kF16 ||
         dtype == DType::kBF16;
}

int64_t DecodeToFloat(DType dtype, const std::byte* bytes, int64_t count, float* out) {
  switch (dtype) {
    case DType::kF64:
      // A value beyond float32 becomes infinite and is reported.
      return Decode<double>(bytes, count, out, [](double v) { return static_cast<float>(v); });
    case DType::kF32:
      return Decode<float>(bytes, count, out, [](float v) { return v; });
    case DType::kF16:
      return Decode<uint16_t>(bytes, count, out, FloatFromHalf);
    case DType::kBF16:
      return Decode<uint16_t>(bytes, count, out, FloatFromBfloat16);
    case DType::kI64:
      return Decode<int64_t>(bytes, count, out, [](int64_t v) { return static_cast<float>(v); });
    case DType::kI32:
      return Decode<int32_t>(bytes, count, out, [](int32_t v) { return static_cast<float>(v); });
    case DType::kU8:
      return Decode<uint8_t>(bytes, count, out, [](uint8_t v) { return static_cast<float>(v); });
  }
  return 0;
}

int64_t FindNonFinite(DType dtype, const std::byte* bytes, int64_t count) {
  switch (dtype) {
    case DType::kF16:
      return FindExponent<uint16_t>(bytes, count, 0x7c00);
    case DType::kBF16:
      return FindExponent<uint16_t>(bytes, count, 0x7f80);
    case DType::kF32:
      return FindExponent<uint32_t>(bytes, count, 0x7f800000);
    case DType::kF64: {
      float decoded[256];
      for (int64_t begin = 0; begin < count; begin += std::ssize(decoded)) {
        const int64_t bad = DecodeToFloat(dtype, bytes + begin * ItemSize(dtype),
                                          std::min(std::ssize(decoded), count - begin), decoded);
        if (bad >= 0) return begin + bad;
      }
      return -1;
    }
    case DType::kI64:
    case DType::kI32:
    case DType::kU8:
      return -1;
  }
  return -1;
}

float RoundTo(DType dtype, float value) {
  switch (dtype) {
    case DType::kF16:
      return static_cast<float>(Eigen::half(value));
    case DType::kBF16:
      return static_cast<float>(Eigen::bfloat16(value));
    default:
      return value;
  }
}

uint16_t HalfBits(DType dtype, float value) {
  return dtype == DType::kF16 ? Eigen::numext::bit_cast<uint16_t>(Eigen::half(value))
                              : Eigen::numext::bit_cast<uint16_t>(Eigen::bfloat16(value));
}

}  // namespace certiq::engine
