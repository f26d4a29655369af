#include "contract/convert.h"

#include <optional>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/strings/string_view.h"
#include "base/status.h"
#include "contract/enums.h"

namespace certiq::server {
namespace {

using base::InvalidField;

// Held out where the damping rule needs tokens and the header says nothing.
constexpr double kDefaultHeldOut = 0.125;

}  // namespace

absl::Status CheckName(absl::string_view field, absl::string_view value, size_t limit) {
  if (value.size() <= limit) return absl::OkStatus();
  return InvalidField(
      field, absl::StrCat("expected at most ", limit, " bytes, got ", value.size(), " bytes"));
}

absl::StatusOr<MatrixShape> ReadMatrix(bool has, const v1::TensorHeader& header,
                                       absl::string_view field, absl::string_view dimensions) {
  if (!has) return InvalidField(field, "expected a tensor header, got none");
  if (absl::Status name = CheckName(absl::StrCat(field, ".name"), header.name(), kMaxNameBytes);
      !name.ok()) {
    return name;
  }
  const absl::StatusOr<engine::DType> dtype =
      FromWire(header.dtype(), kDataTypes, absl::StrCat(field, ".dtype"));
  if (!dtype.ok()) return dtype.status();
  if (header.shape_size() != 2) {
    return InvalidField(
        absl::StrCat(field, ".shape"),
        absl::StrCat("expected two dimensions, ", dimensions, ", got ", header.shape_size()));
  }
  return MatrixShape{header.shape(0), header.shape(1), *dtype};
}

absl::Status FirstError(std::initializer_list<absl::Status> statuses) {
  for (const absl::Status& status : statuses) {
    if (!status.ok()) return status;
  }
  return absl::OkStatus();
}

absl::StatusOr<QuantizeCall> FromProto(const v1::QuantizeHeader& header) {
  absl::Status names = FirstError({CheckName("request_id", header.request_id(), kMaxRequestIdBytes),
                                   CheckName("layer_name", header.layer_name(), kMaxNameBytes)});
  if (!names.ok()) return names;
  // A NaN is not in the range either.
  if (header.has_held_out_fraction() &&
      !(header.held_out_fraction() >= 0 && header.held_out_fraction() <= 0.5)) {
    return InvalidField("held_out_fraction", absl::StrCat("expected a number in [0, 0.5], got ",
                                                          header.held_out_fraction()));
  }
  if (header.sequence_rows() < 0) {
    return InvalidField("sequence_rows",
                        absl::StrCat("expected at least 0, got ", header.sequence_rows()));
  }

  const absl::StatusOr<engine::QuantizationSpec> spec = FromProto(header.spec());
  if (!spec.ok()) return spec.status();
  absl::StatusOr<engine::ResolvedSpec> resolved = engine::ResolveSpec(*spec);
  if (!resolved.ok()) return resolved.status();

  const absl::StatusOr<MatrixShape> weight = ReadMatrix(
      header.has_weight(), header.weight(), "weight", "[output channels, input features]");
  if (!weight.ok()) return weight.status();
  QuantizeCall call;
  call.request_id = header.request_id();
  call.layer_name = header.layer_name();
  call.layer.spec = *std::move(resolved);
  call.layer.rows = weight->rows;
  call.layer.features = weight->columns;
  call.layer.weight_dtype = weight->dtype;
  if (!header.calibration_id().empty()) {
    if (header.has_x() || header.has_x_quantized() || header.has_held_out_fraction() ||
        header.sequence_rows() != 0) {
      return InvalidField("calibration_id",
                          "expected either a calibration, or x with how to hold rows out");
    }
    call.calibration_id = header.calibration_id();
    return call;
  }
  const absl::StatusOr<MatrixShape> x =
      ReadMatrix(header.has_x(), header.x(), "x", "[tokens, input features]");
  if (!x.ok()) return x.status();
  call.layer.tokens = x->rows;
  call.layer.x_features = x->columns;
  call.layer.x_dtype = x->dtype;
  if (header.has_x_quantized()) {
    const absl::StatusOr<MatrixShape> x_quantized =
        ReadMatrix(true, header.x_quantized(), "x_quantized", "[tokens, input features]");
    if (!x_quantized.ok()) return x_quantized.status();
    call.layer.x_quantized_dtype = x_quantized->dtype;
    call.layer.x_quantized_tokens = x_quantized->rows;
    call.layer.x_quantized_features = x_quantized->columns;
  }
  if (header.has_held_out_fraction()) {
    call.layer.held_out_fraction = header.held_out_fraction();
  } else if (call.layer.spec.NeedsHeldOut()) {
    call.layer.held_out_fraction = kDefaultHeldOut;
  }
  call.layer.sequence_rows = header.sequence_rows();
  return call;
}

v1::Phase ToProto(engine::Phase phase) { return ToWire(phase, kPhases); }
v1::DataType ToProto(engine::DType dtype) { return ToWire(dtype, kDataTypes); }

v1::ResultHeader ToProto(const std::vector<engine::ResultTensor>& tensors) {
  v1::ResultHeader header;
  int64_t bytes = 0;
  for (const engine::ResultTensor& tensor : tensors) {
    v1::TensorHeader* const to = header.add_tensors();
    to->set_name(tensor.role);
    to->set_dtype(ToProto(tensor.dtype));
    to->mutable_shape()->Add(tensor.shape.begin(), tensor.shape.end());
    bytes += static_cast<int64_t>(tensor.bytes.size());
  }
  header.set_total_bytes(bytes);
  return header;
}

}  // namespace certiq::server
