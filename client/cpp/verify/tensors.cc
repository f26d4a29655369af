#include "tensors.h"

#include <openssl/evp.h>

#include <bit>
#include <cmath>
#include <cstring>
#include <limits>

#include "absl/status/status.h"
#include "absl/strings/escaping.h"
#include "absl/strings/str_cat.h"
#include "base/status_macros.h"

namespace certiq::verify {
namespace {

template <typename T>
T Load(const char* bytes) {
  T value;
  std::memcpy(&value, bytes, sizeof(value));
  return value;
}

// IEEE binary16: sign, 5 bits of exponent (bias 15), 10 of mantissa.
float FromHalf(uint16_t bits) {
  const int exponent = bits >> 10 & 0x1f;
  const int mantissa = bits & 0x3ff;
  float magnitude = 0;
  if (exponent == 0x1f) {
    magnitude = mantissa == 0 ? std::numeric_limits<float>::infinity()
                              : std::numeric_limits<float>::quiet_NaN();
  } else if (exponent == 0) {
    magnitude = std::ldexp(static_cast<float>(mantissa), -24);
  } else {
    magnitude = std::ldexp(static_cast<float>(mantissa + 0x400), exponent - 25);
  }
  return (bits & 0x8000) != 0 ? -magnitude : magnitude;
}

float Element(v1::DataType dtype, const char* bytes) {
  switch (dtype) {
    case v1::DATA_TYPE_F64:
      return static_cast<float>(Load<double>(bytes));
    case v1::DATA_TYPE_F32:
      return Load<float>(bytes);
    case v1::DATA_TYPE_F16:
      return FromHalf(Load<uint16_t>(bytes));
    case v1::DATA_TYPE_BF16:
      return std::bit_cast<float>(static_cast<uint32_t>(Load<uint16_t>(bytes)) << 16);
    case v1::DATA_TYPE_I64:
      return static_cast<float>(Load<int64_t>(bytes));
    case v1::DATA_TYPE_I32:
      return static_cast<float>(Load<int32_t>(bytes));
    case v1::DATA_TYPE_U8:
      return static_cast<float>(static_cast<unsigned char>(*bytes));
    default:
      return 0;
  }
}

}  // namespace

std::string Sha256Hex(absl::string_view bytes) {
  unsigned char digest[EVP_MAX_MD_SIZE];
  unsigned int size = 0;
  if (EVP_Digest(bytes.data(), bytes.size(), digest, &size, EVP_sha256(), nullptr) != 1) return "";
  return absl::BytesToHexString(absl::string_view(reinterpret_cast<const char*>(digest), size));
}

float RoundToType(v1::DataType dtype, float value) {
  if (!std::isfinite(value) || value == 0) return value;
  int mantissa_bits = 0;
  int lowest_exponent = 0;
  double largest = 0;
  if (dtype == v1::DATA_TYPE_F16) {
    mantissa_bits = 10;
    lowest_exponent = -14;
    largest = 65504;
  } else if (dtype == v1::DATA_TYPE_BF16) {
    mantissa_bits = 7;
    lowest_exponent = -126;
    largest = 0x1.fep127;
  } else {
    return value;
  }
  // Multiples of the unit in the last place; below the normal numbers it stays the same.
  const int exponent = std::max(std::ilogb(value), lowest_exponent);
  const double unit = std::ldexp(1.0, exponent - mantissa_bits);
  const double rounded = std::nearbyint(static_cast<double>(value) / unit) * unit;
  if (std::abs(rounded) > largest) return std::copysign(INFINITY, value);
  return static_cast<float>(rounded);
}

void DecodeFloats(const TensorView& tensor, int64_t first, int64_t count, float* to) {
  const int64_t size = DataTypeBytes(tensor.dtype);
  const char* from = tensor.data.data() + first * size;
  for (int64_t i = 0; i < count; ++i) to[i] = Element(tensor.dtype, from + i * size);
}

absl::StatusOr<std::vector<int64_t>> DecodeIntegers(const TensorView& tensor) {
  if (tensor.dtype != v1::DATA_TYPE_I32 && tensor.dtype != v1::DATA_TYPE_I64) {
    return absl::InvalidArgumentError(
        absl::StrCat(tensor.name, ": expected I32 or I64, got ", DataTypeName(tensor.dtype)));
  }
  const auto size = static_cast<size_t>(DataTypeBytes(tensor.dtype));
  std::vector<int64_t> values(tensor.data.size() / size);
  for (size_t i = 0; i < values.size(); ++i) {
    const char* from = tensor.data.data() + i * size;
    values[i] = size == 4 ? Load<int32_t>(from) : Load<int64_t>(from);
  }
  return values;
}

absl::Status ExpectTensor(const TensorView& tensor, v1::DataType dtype,
                          const std::vector<int64_t>& shape) {
  if (tensor.dtype != dtype || tensor.shape != shape) {
    return absl::InvalidArgumentError(
        absl::StrCat(tensor.name, ": expected ", DataTypeName(dtype), " ", ShapeText(shape),
                     ", got ", DataTypeName(tensor.dtype), " ", ShapeText(tensor.shape)));
  }
  ASSIGN_OR_RETURN(const int64_t bytes, TensorBytes(dtype, shape));
  if (static_cast<int64_t>(tensor.data.size()) != bytes) {
    return absl::InvalidArgumentError(
        absl::StrCat(tensor.name, ": expected ", bytes, " bytes, got ", tensor.data.size()));
  }
  return absl::OkStatus();
}

}  // namespace certiq::verify
