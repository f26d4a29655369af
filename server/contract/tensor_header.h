// Announcements of matrices, read from the contract.

#ifndef CERTIQ_CONTRACT_TENSOR_HEADER_H_
#define CERTIQ_CONTRACT_TENSOR_HEADER_H_

#include <cstdint>

#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "certiq/v1/tensor.pb.h"
#include "engine/kernels/dtype.h"

namespace certiq::server {

// What a matrix header announces; sizes are not checked yet.
struct MatrixShape {
  int64_t rows = 0;
  int64_t columns = 0;
  engine::DType dtype = engine::DType::kF32;
};

// INVALID_ARGUMENT about `field` where there is no header or it is none of a matrix. `dimensions`
// says what they are: "[tokens, input features]".
absl::StatusOr<MatrixShape> ReadMatrix(bool has, const v1::TensorHeader& header,
                                       absl::string_view field, absl::string_view dimensions);

}  // namespace certiq::server

#endif  // CERTIQ_CONTRACT_TENSOR_HEADER_H_
