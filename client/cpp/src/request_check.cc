#include "request_check.h"

#include <string>

#include "absl/strings/str_cat.h"
#include "base/status_macros.h"
#include "certiq/status.h"

namespace certiq {
namespace {

absl::Status Invalid(absl::string_view field, absl::string_view description) {
  return FieldError(absl::StatusCode::kInvalidArgument, field, description);
}

std::string Named(const TensorView& tensor) {
  return absl::StrCat("\"", tensor.name, "\" ", DataTypeName(tensor.dtype), " ",
                      ShapeText(tensor.shape));
}

absl::Status CheckMatrix(absl::string_view field, const TensorView& tensor) {
  if (tensor.shape.size() != 2 || tensor.shape[0] < 1 || tensor.shape[1] < 1) {
    return Invalid(absl::StrCat(field, ".shape"),
                   absl::StrCat("expected two dimensions of at least 1, got ", Named(tensor)));
  }
  const absl::StatusOr<int64_t> bytes = TensorBytes(tensor.dtype, tensor.shape);
  if (!bytes.ok())
    return Invalid(field, absl::StrCat(bytes.status().message(), " in ", Named(tensor)));
  if (static_cast<uint64_t>(*bytes) != tensor.data.size()) {
    return Invalid(field, absl::StrCat("expected ", *bytes, " bytes for ", Named(tensor), ", got ",
                                       tensor.data.size()));
  }
  return absl::OkStatus();
}

absl::Status CheckRow(const char* field, int64_t row_bytes) {
  if (row_bytes <= kMaxRowBytes) return absl::OkStatus();
  return Invalid(field, absl::StrCat("expected rows of at most ", kMaxRowBytes,
                                     " bytes (a message carries whole rows), got ", row_bytes));
}

int64_t RowBytes(const TensorView& tensor) { return tensor.shape[1] * DataTypeBytes(tensor.dtype); }

}  // namespace

v1::TensorHeader HeaderOf(const TensorView& tensor) {
  v1::TensorHeader header;
  header.set_name(tensor.name);
  header.set_dtype(tensor.dtype);
  header.mutable_shape()->Assign(tensor.shape.begin(), tensor.shape.end());
  return header;
}

absl::Status CheckWeight(const TensorView& weight) {
  RETURN_IF_ERROR(CheckMatrix("weight", weight));
  if (!IsFloatingPoint(weight.dtype)) {
    return Invalid("weight.dtype",
                   absl::StrCat("expected F64, F32, F16 or BF16, got ", Named(weight)));
  }
  return CheckRow("weight.shape", RowBytes(weight));
}

absl::Status CheckActivations(const TensorView& x, const std::optional<TensorView>& x_quantized) {
  RETURN_IF_ERROR(CheckMatrix("x", x));
  int64_t row_bytes = RowBytes(x);
  if (x_quantized.has_value()) {
    RETURN_IF_ERROR(CheckMatrix("x_quantized", *x_quantized));
    if (x_quantized->shape != x.shape) {
      return Invalid("x_quantized.shape",
                     absl::StrCat("expected ", ShapeText(x.shape), " to match x ", Named(x),
                                  ", got x_quantized ", Named(*x_quantized)));
    }
    row_bytes += RowBytes(*x_quantized);
  }
  return CheckRow("x.shape", row_bytes);
}

absl::Status CheckRequest(const QuantizeRequestData& request) {
  const TensorView& weight = request.weight;
  RETURN_IF_ERROR(CheckWeight(weight));
  if (!request.x.has_value()) {
    if (request.x_quantized.has_value()) {
      return Invalid("x_quantized", "expected x beside it, got x_quantized alone");
    }
    if (request.calibration_id.empty()) {
      return Invalid("x", "expected activations or a calibration_id, got neither");
    }
    return absl::OkStatus();
  }
  const TensorView& x = *request.x;
  RETURN_IF_ERROR(CheckActivations(x, request.x_quantized));
  if (x.shape[1] != weight.shape[1]) {
    return Invalid("x.shape", absl::StrCat("expected [tokens, ", weight.shape[1],
                                           "] to match the features of weight ", Named(weight),
                                           ", got x ", Named(x)));
  }
  return absl::OkStatus();
}

v1::QuantizeHeader MakeHeader(const QuantizeRequestData& request) {
  v1::QuantizeHeader header;
  header.set_request_id(request.request_id);
  header.set_layer_name(request.layer_name);
  *header.mutable_spec() = request.spec;
  *header.mutable_weight() = HeaderOf(request.weight);
  if (request.x.has_value()) *header.mutable_x() = HeaderOf(*request.x);
  if (request.x_quantized.has_value()) {
    *header.mutable_x_quantized() = HeaderOf(*request.x_quantized);
  }
  if (request.held_out_fraction.has_value()) {
    header.set_held_out_fraction(*request.held_out_fraction);
  }
  header.set_sequence_rows(request.sequence_rows);
  header.set_calibration_id(request.calibration_id);
  return header;
}

int64_t UploadBytes(const QuantizeRequestData& request) {
  size_t bytes = request.weight.data.size();
  if (request.x.has_value()) bytes += request.x->data.size();
  if (request.x_quantized.has_value()) bytes += request.x_quantized->data.size();
  return static_cast<int64_t>(bytes);
}

}  // namespace certiq
