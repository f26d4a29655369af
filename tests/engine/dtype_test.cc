#include "engine/kernels/dtype.h"

#include <gtest/gtest.h>

#include <cmath>
#include <cstring>
#include <limits>
#include <vector>

namespace certiq::engine {
namespace {

// The value of binary16 bits by definition.
double HalfByDefinition(uint16_t bits) {
  const int exponent = (bits >> 10) & 31;
  const int mantissa = bits & 1023;
  const double sign = (bits & 0x8000) != 0 ? -1 : 1;
  if (exponent == 31) return mantissa == 0 ? sign * INFINITY : NAN;
  if (exponent == 0) return sign * std::ldexp(mantissa, -24);
  return sign * std::ldexp(1024 + mantissa, exponent - 25);
}

TEST(DtypeTest, DecodesEveryHalfExactly) {
  for (uint32_t bits = 0; bits < 0x10000; ++bits) {
    const auto half = static_cast<uint16_t>(bits);
    const double expected = HalfByDefinition(half);
    float got = 0;
    const int64_t bad =
        DecodeToFloat(DType::kF16, reinterpret_cast<const std::byte*>(&half), 1, &got);
    if (std::isfinite(expected)) {
      ASSERT_EQ(bad, -1) << bits;
      ASSERT_EQ(got, expected) << bits;
      ASSERT_EQ(std::signbit(got), (bits & 0x8000) != 0) << bits;
      ASSERT_EQ(HalfBits(DType::kF16, got), half);
    } else {
      ASSERT_EQ(bad, 0) << bits;
    }
  }
}

template <typename T>
int64_t Decode(DType dtype, const std::vector<T>& values, std::vector<float>& out) {
  out.assign(values.size(), 0);
  // One byte off alignment, as a slice of a message may be.
  std::vector<std::byte> bytes(values.size() * sizeof(T) + 1);
  std::memcpy(bytes.data() + 1, values.data(), values.size() * sizeof(T));
  return DecodeToFloat(dtype, bytes.data() + 1, static_cast<int64_t>(values.size()), out.data());
}

TEST(DtypeTest, DecodesOtherTypes) {
  std::vector<float> out;
  EXPECT_EQ(Decode<double>(DType::kF64, {1.0, -1e-50, 1e38}, out), -1);
  EXPECT_EQ(out, (std::vector<float>{1.0f, -0.0f, 1e38f}));
  EXPECT_EQ(Decode<uint16_t>(DType::kBF16, {0x3f80, 0xc000}, out), -1);
  EXPECT_EQ(out, (std::vector<float>{1.0f, -2.0f}));
  EXPECT_EQ(Decode<int64_t>(DType::kI64, {-5, int64_t{1} << 40}, out), -1);
  EXPECT_EQ(out, (std::vector<float>{-5.0f, 0x1p40f}));
  EXPECT_EQ(Decode<int32_t>(DType::kI32, {7, -8}, out), -1);
  EXPECT_EQ(out, (std::vector<float>{7.0f, -8.0f}));
  EXPECT_EQ(Decode<uint8_t>(DType::kU8, {0, 255}, out), -1);
  EXPECT_EQ(out, (std::vector<float>{0.0f, 255.0f}));
}

TEST(DtypeTest, NamesTheFirstValueThatIsNotFinite) {
  std::vector<float> out;
  const float nan = std::numeric_limits<float>::quiet_NaN();
  EXPECT_EQ(Decode<float>(DType::kF32, {1, 2, nan, INFINITY}, out), 2);
  EXPECT_EQ(Decode<double>(DType::kF64, {1, 1e39}, out), 1) << "beyond float32";
  EXPECT_EQ(Decode<uint16_t>(DType::kBF16, {0x7f80}, out), 0);
}

TEST(DtypeTest, RoundsToNearestEven) {
  EXPECT_EQ(RoundTo(DType::kF16, 1.0f + 0x1p-11f), 1.0f);
  EXPECT_EQ(RoundTo(DType::kF16, 1.0f + 3 * 0x1p-11f), 1.0f + 0x1p-9f);
  EXPECT_EQ(RoundTo(DType::kBF16, 1.0f + 0x1p-8f), 1.0f);
  EXPECT_TRUE(std::isinf(RoundTo(DType::kF16, 70000.0f)));
  EXPECT_EQ(RoundTo(DType::kF32, 0.1f), 0.1f);
}

}  // namespace
}  // namespace certiq::engine
