// Dense tensors, laid out as in files and on the wire.
#ifndef CERTIQ_CLIENT_CPP_INCLUDE_CERTIQ_TENSOR_H_
#define CERTIQ_CLIENT_CPP_INCLUDE_CERTIQ_TENSOR_H_

#include <cstdint>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "absl/types/span.h"
#include "certiq/v1/tensor.pb.h"

namespace certiq {

// A named tensor whose bytes belong to someone else: the bytes must outlive the view.
// Row-major, little-endian, without padding; no alignment is promised.
struct TensorView {
  std::string name;
  v1::DataType dtype = v1::DATA_TYPE_UNSPECIFIED;
  std::vector<int64_t> shape;
  // product(shape) * DataTypeBytes(dtype) bytes.
  absl::string_view data;
};

// A named tensor that owns its bytes; layout as TensorView.
struct OwnedTensor {
  std::string name;
  v1::DataType dtype = v1::DATA_TYPE_UNSPECIFIED;
  std::vector<int64_t> shape;
  std::string data;

  TensorView View() const { return {name, dtype, shape, data}; }
};

// Bytes of one element; 0 for DATA_TYPE_UNSPECIFIED and values of a newer contract.
int64_t DataTypeBytes(v1::DataType dtype);

// "F32", "BF16", …: the names safetensors uses too. "UNSPECIFIED" for anything else.
std::string DataTypeName(v1::DataType dtype);

// DATA_TYPE_UNSPECIFIED where the name is none of the contract's types.
v1::DataType DataTypeFromName(absl::string_view name);

// F64, F32, F16 or BF16.
bool IsFloatingPoint(v1::DataType dtype);

// product(shape) * DataTypeBytes(dtype). INVALID_ARGUMENT for an unknown dtype, a negative
// dimension or a size past int64. An empty shape is a scalar.
absl::StatusOr<int64_t> TensorBytes(v1::DataType dtype, absl::Span<const int64_t> shape);

// "[576, 1536]".
std::string ShapeText(absl::Span<const int64_t> shape);

}  // namespace certiq

#endif  // CERTIQ_CLIENT_CPP_INCLUDE_CERTIQ_TENSOR_H_
