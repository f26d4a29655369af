#include "rpc/services/convert_calibration.h"

#include "absl/strings/str_cat.h"
#include "base/sha256.h"
#include "base/status.h"
#include "base/status_macros.h"
#include "contract/enums.h"
#include "contract/limits.h"
#include "contract/time.h"

namespace certiq::server {
namespace {

using base::InvalidField;

constexpr size_t kMaxStreamIdBytes = 128;

absl::Status CheckStreamId(const std::string& id) {
  if (!id.empty() && id.size() <= kMaxStreamIdBytes) return absl::OkStatus();
  return InvalidField("stream_id", absl::StrCat("expected 1 to ", kMaxStreamIdBytes, " bytes, got ",
                                                id.size(), " bytes"));
}

absl::StatusOr<bool> Mismatched(v1::CalibrationKind kind) {
  switch (kind) {
    case v1::CALIBRATION_KIND_UNSPECIFIED:
    case v1::CALIBRATION_KIND_MATCHED:
      return false;
    case v1::CALIBRATION_KIND_MISMATCHED:
      return true;
    default:
      return InvalidField("kind", absl::StrCat("expected CALIBRATION_KIND_MATCHED or "
                                               "CALIBRATION_KIND_MISMATCHED; got ",
                                               NameOf(kind)));
  }
}

}  // namespace

v1::CalibrationKind KindOf(bool mismatched) {
  return mismatched ? v1::CALIBRATION_KIND_MISMATCHED : v1::CALIBRATION_KIND_MATCHED;
}

absl::StatusOr<CalibrationRequest> ReadCreateRequest(const v1::CreateCalibrationRequest& request) {
  RETURN_IF_ERROR(CheckName("request_id", request.request_id(), kMaxRequestIdBytes));
  ASSIGN_OR_RETURN(const bool mismatched, Mismatched(request.kind()));
  ASSIGN_OR_RETURN(const int64_t ttl, ReadDuration(request.has_ttl(), request.ttl(), "ttl", kMicros,
                                                   kDefaultTtlMicros));
  CalibrationRequest to;
  to.request_id = request.request_id();
  base::Sha256 digest;
  digest.Update(request.SerializeAsString());
  to.digest = digest.Finish();
  to.features = request.features();
  to.mismatched = mismatched;
  to.held_out_fraction = request.held_out_fraction();
  to.sequence_rows = request.sequence_rows();
  to.labels.assign(request.labels().begin(), request.labels().end());
  to.ttl_micros = ttl;
  return to;
}

absl::StatusOr<AccumulateRequest> ReadAccumulateHeader(const v1::AccumulateHeader& header,
                                                       bool mismatched) {
  RETURN_IF_ERROR(CheckStreamId(header.stream_id()));
  ASSIGN_OR_RETURN(const engine::DType x, FromWire(header.x(), kDataTypes, "x"));
  AccumulateRequest call{.stream_id = header.stream_id(), .x = x};
  if (!mismatched) {
    if (header.x_quantized() == v1::DATA_TYPE_UNSPECIFIED) return call;
    return InvalidField("x_quantized", "expected none: the calibration's inputs are matched");
  }
  ASSIGN_OR_RETURN(const engine::DType x_quantized,
                   FromWire(header.x_quantized(), kDataTypes, "x_quantized"));
  call.x_quantized = x_quantized;
  return call;
}

absl::StatusOr<bool> ReadPortion(v1::Portion portion) {
  switch (portion) {
    case v1::PORTION_UNSPECIFIED:
    case v1::PORTION_FIT:
      return false;
    case v1::PORTION_HELD_OUT:
      return true;
    default:
      return InvalidField("portion", absl::StrCat("expected PORTION_FIT or PORTION_HELD_OUT; got ",
                                                  NameOf(portion)));
  }
}

absl::StatusOr<MatrixLayout> ReadLayout(v1::MatrixLayout layout, MatrixLayout unset) {
  switch (layout) {
    case v1::MATRIX_LAYOUT_UNSPECIFIED:
      return unset;
    case v1::MATRIX_LAYOUT_FULL:
      return MatrixLayout::kFull;
    case v1::MATRIX_LAYOUT_UPPER:
      return MatrixLayout::kUpper;
    default:
      return InvalidField("layout", absl::StrCat("expected MATRIX_LAYOUT_FULL or "
                                                 "MATRIX_LAYOUT_UPPER; got ",
                                                 NameOf(layout)));
  }
}

absl::StatusOr<ImportRequest> ReadStatisticsHeader(const v1::StatisticsHeader& header,
                                                   const CalibrationRecord& calibration) {
  RETURN_IF_ERROR(CheckStreamId(header.stream_id()));
  if (header.tokens() < 1 || header.tokens() > kMaxTokens) {
    return InvalidField("tokens",
                        absl::StrCat("expected 1 to ", kMaxTokens, ", got ", header.tokens()));
  }
  ASSIGN_OR_RETURN(const bool held_out, ReadPortion(header.portion()));
  ASSIGN_OR_RETURN(const engine::DType dtype, FromWire(header.dtype(), kDataTypes, "dtype"));
  if (dtype != engine::DType::kF64 && dtype != engine::DType::kF32) {
    return InvalidField("dtype", absl::StrCat("expected F64 or F32, got ", engine::Name(dtype)));
  }
  ASSIGN_OR_RETURN(const MatrixLayout layout, ReadLayout(header.layout(), MatrixLayout::kFull));
  if (header.features() != 0 && header.features() != calibration.features()) {
    return InvalidField("features",
                        absl::StrCat("expected ", calibration.features(),
                                     " as the calibration has, got ", header.features()));
  }
  if (header.kind() != v1::CALIBRATION_KIND_UNSPECIFIED &&
      header.kind() != KindOf(calibration.mismatched())) {
    return InvalidField("kind",
                        absl::StrCat("expected ", NameOf(KindOf(calibration.mismatched())),
                                     " as the calibration is, got ", NameOf(header.kind())));
  }
  return ImportRequest{header.stream_id(), header.tokens(), held_out, dtype, layout};
}

v1::StreamProgress ToProto(const StreamView& stream) {
  v1::StreamProgress to;
  to.set_stream_id(stream.id);
  to.set_received(stream.received);
  to.set_durable(stream.durable);
  to.set_tokens(stream.tokens);
  to.set_live(stream.live);
  to.set_imported(stream.imported);
  return to;
}

v1::Calibration ToProto(const CalibrationView& view) {
  const CalibrationRecord& record = view.record;
  v1::Calibration to;
  to.set_id(record.id());
  to.set_state(record.finalize_time() == 0 ? v1::CALIBRATION_STATE_OPEN
                                           : v1::CALIBRATION_STATE_FINALIZED);
  to.set_kind(KindOf(record.mismatched()));
  to.set_features(record.features());
  to.set_held_out_fraction(record.held_out_fraction());
  to.set_held_out_block_rows(record.held_out_block_rows());
  for (const std::string& label : record.labels()) to.add_labels(label);
  to.set_tokens(record.tokens());
  to.set_held_out_tokens(record.held_out_tokens());
  to.set_bytes(view.bytes);
  for (const StreamView& stream : view.streams) *to.add_streams() = ToProto(stream);
  SetTime(record.create_time(), to.mutable_create_time());
  if (record.finalize_time() != 0) SetTime(record.finalize_time(), to.mutable_finalize_time());
  SetTime(ExpireTime(record), to.mutable_expire_time());
  to.set_jobs(view.jobs);
  to.set_sums_sha256(record.sums_sha256());
  return to;
}

}  // namespace certiq::server
