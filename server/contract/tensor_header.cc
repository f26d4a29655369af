#include "contract/tensor_header.h"

#include "absl/strings/str_cat.h"
#include "base/status.h"
#include "base/status_macros.h"
#include "contract/enums.h"
#include "contract/limits.h"

namespace certiq::server {

absl::StatusOr<MatrixShape> ReadMatrix(bool has, const v1::TensorHeader& header,
                                       absl::string_view field, absl::string_view dimensions) {
  if (!has) return base::InvalidField(field, "expected a tensor header, got none");
  RETURN_IF_ERROR(CheckName(absl::StrCat(field, ".name"), header.name(), kMaxNameBytes));
  ASSIGN_OR_RETURN(const engine::DType dtype,
                   FromWire(header.dtype(), kDataTypes, absl::StrCat(field, ".dtype")));
  if (header.shape_size() != 2) {
    return base::InvalidField(
        absl::StrCat(field, ".shape"),
        absl::StrCat("expected two dimensions, ", dimensions, ", got ", header.shape_size()));
  }
  return MatrixShape{header.shape(0), header.shape(1), dtype};
}

}  // namespace certiq::server
