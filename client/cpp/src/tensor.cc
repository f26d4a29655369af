#include "certiq/tensor.h"

#include <array>
#include <cstdint>
#include <string>

#include "absl/status/status.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"

namespace certiq {
namespace {

struct TypeInfo {
  v1::DataType dtype;
  const char* name;
  int64_t bytes;
};

constexpr std::array<TypeInfo, 7> kTypes = {{
    {v1::DATA_TYPE_F64, "F64", 8},
    {v1::DATA_TYPE_F32, "F32", 4},
    {v1::DATA_TYPE_F16, "F16", 2},
    {v1::DATA_TYPE_BF16, "BF16", 2},
    {v1::DATA_TYPE_I64, "I64", 8},
    {v1::DATA_TYPE_I32, "I32", 4},
    {v1::DATA_TYPE_U8, "U8", 1},
}};

}  // namespace

int64_t DataTypeBytes(v1::DataType dtype) {
  for (const TypeInfo& type : kTypes) {
    if (type.dtype == dtype) return type.bytes;
  }
  return 0;
}

std::string DataTypeName(v1::DataType dtype) {
  for (const TypeInfo& type : kTypes) {
    if (type.dtype == dtype) return type.name;
  }
  return "UNSPECIFIED";
}

v1::DataType DataTypeFromName(absl::string_view name) {
  for (const TypeInfo& type : kTypes) {
    if (name == type.name) return type.dtype;
  }
  return v1::DATA_TYPE_UNSPECIFIED;
}

bool IsFloatingPoint(v1::DataType dtype) {
  return dtype == v1::DATA_TYPE_F64 || dtype == v1::DATA_TYPE_F32 || dtype == v1::DATA_TYPE_F16 ||
         dtype == v1::DATA_TYPE_BF16;
}

absl::StatusOr<int64_t> TensorBytes(v1::DataType dtype, absl::Span<const int64_t> shape) {
  int64_t bytes = DataTypeBytes(dtype);
  if (bytes == 0) {
    return absl::InvalidArgumentError(
        absl::StrCat("dtype: expected one of F64, F32, F16, BF16, I64, I32, U8, got value ",
                     static_cast<int>(dtype)));
  }
  for (const int64_t dimension : shape) {
    if (dimension < 0) {
      return absl::InvalidArgumentError(
          absl::StrCat("shape: expected no negative dimension, got ", ShapeText(shape)));
    }
    if (__builtin_mul_overflow(bytes, dimension, &bytes)) {
      return absl::InvalidArgumentError(
          absl::StrCat("shape: ", ShapeText(shape), " of ", DataTypeName(dtype),
                       " takes more bytes than a 64-bit integer holds"));
    }
  }
  return bytes;
}

std::string ShapeText(absl::Span<const int64_t> shape) {
  return absl::StrCat("[", absl::StrJoin(shape, ", "), "]");
}

}  // namespace certiq
