// Decoding of tensor bytes to numbers, and SHA-256 digests.
#ifndef CERTIQ_CLIENT_CPP_VERIFY_TENSORS_H_
#define CERTIQ_CLIENT_CPP_VERIFY_TENSORS_H_

#include <cstdint>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "certiq/tensor.h"

namespace certiq::verify {

// Lowercase hex.
std::string Sha256Hex(absl::string_view bytes);

// The value nearest to `value`, ties to even, that the type holds, for F16 and BF16; `value` itself
// for any other.
float RoundToType(v1::DataType dtype, float value);

// Elements [first, first + count) as float32, which is what the service reads them as: F64, I64 and
// I32 are rounded. REQUIRES: the elements are there.
void DecodeFloats(const TensorView& tensor, int64_t first, int64_t count, float* to);

// The elements of an I32 or I64 tensor. INVALID_ARGUMENT naming the tensor for any other type.
absl::StatusOr<std::vector<int64_t>> DecodeIntegers(const TensorView& tensor);

// INVALID_ARGUMENT naming the tensor unless it has this type and shape and as many bytes.
absl::Status ExpectTensor(const TensorView& tensor, v1::DataType dtype,
                          const std::vector<int64_t>& shape);

}  // namespace certiq::verify

#endif  // CERTIQ_CLIENT_CPP_VERIFY_TENSORS_H_
