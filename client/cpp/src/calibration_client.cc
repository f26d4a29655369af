#include "certiq/calibration_client.h"

#include <algorithm>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "activation_sender.h"
#include "base/status_macros.h"
#include "certiq/status.h"
#include "certiq/uuid.h"
#include "certiq/v1/calibration_service.grpc.pb.h"
#include "connection.h"
#include "request_check.h"
#include "rows.h"
#include "statistics_calls.h"
#include "unary.h"

namespace certiq {
namespace {

using Stub = v1::CalibrationService::StubInterface;

// The size of a chunk where the caller gives none. Runs of a program that take up each other's
// streams rely on it, so it does not depend on ClientOptions.
constexpr int64_t kChunkBytes = int64_t{1} << 20;

absl::Status Invalid(absl::string_view field, absl::string_view description) {
  return FieldError(absl::StatusCode::kInvalidArgument, field, description);
}

}  // namespace

struct CalibrationClient::Connection : ServiceConnection<v1::CalibrationService> {};

CalibrationClient::CalibrationClient(std::shared_ptr<const Connection> connection)
    : connection_(std::move(connection)) {}
CalibrationClient::~CalibrationClient() = default;

absl::StatusOr<std::unique_ptr<CalibrationClient>> CalibrationClient::Create(
    ClientOptions options) {
  ASSIGN_OR_RETURN(auto connection, ConnectTo<v1::CalibrationService>(std::move(options)));
  return std::unique_ptr<CalibrationClient>(
      new CalibrationClient(std::make_shared<const Connection>(Connection{std::move(connection)})));
}

absl::StatusOr<v1::Calibration> CalibrationClient::CreateCalibration(
    v1::CreateCalibrationRequest request, const CallOptions& options) const {
  if (request.request_id().empty()) request.set_request_id(RandomUuid());
  return CallUnary(*connection_, &Stub::CreateCalibration, request, options);
}

absl::StatusOr<v1::Calibration> CalibrationClient::Get(const std::string& calibration_id,
                                                       const CallOptions& options) const {
  v1::GetCalibrationRequest request;
  request.set_calibration_id(calibration_id);
  return CallUnary(*connection_, &Stub::GetCalibration, request, options);
}

absl::StatusOr<std::vector<v1::Calibration>> CalibrationClient::List(
    const CalibrationFilter& filter, const CallOptions& options) const {
  v1::ListCalibrationsRequest request;
  request.set_page_size(filter.page_size);
  request.set_label(filter.label);
  return CallPages<v1::Calibration>(
      *connection_, &Stub::ListCalibrations, request, options,
      [](v1::ListCalibrationsResponse* page) { return page->mutable_calibrations(); });
}

absl::StatusOr<v1::Calibration> CalibrationClient::Find(const std::string& id_or_label,
                                                        const CallOptions& options) const {
  if (id_or_label.empty()) return Invalid("calibration_id", "expected an id or a label, got none");
  absl::StatusOr<v1::Calibration> by_id = Get(id_or_label, options);
  // A label need not look like an id, which the server may say in either way.
  if (!absl::IsNotFound(by_id.status()) && !absl::IsInvalidArgument(by_id.status())) return by_id;
  ASSIGN_OR_RETURN(const std::vector<v1::Calibration> labelled,
                   List({.label = id_or_label}, options));
  if (labelled.empty()) {
    return absl::NotFoundError(
        absl::StrCat("no calibration has the id or the label \"", id_or_label, "\""));
  }
  if (labelled.size() > 1) {
    return absl::FailedPreconditionError(absl::StrCat(
        labelled.size(), " calibrations have the label \"", id_or_label, "\": ",
        absl::StrJoin(labelled, ", ", [](std::string* out, const v1::Calibration& calibration) {
          absl::StrAppend(out, calibration.id());
        })));
  }
  // Lists leave the streams out.
  return Get(labelled.front().id(), options);
}

absl::StatusOr<v1::Calibration> CalibrationClient::Finalize(const FinalizeRequest& finalize,
                                                            const CallOptions& options) const {
  v1::FinalizeCalibrationRequest request;
  request.set_calibration_id(finalize.calibration_id);
  if (finalize.expected_tokens.has_value()) request.set_expected_tokens(*finalize.expected_tokens);
  for (const std::string& stream : finalize.expected_stream_ids) {
    request.add_expected_stream_ids(stream);
  }
  return CallUnary(*connection_, &Stub::FinalizeCalibration, request, options);
}

absl::Status CalibrationClient::Delete(const std::string& calibration_id,
                                       const CallOptions& options) const {
  v1::DeleteCalibrationRequest request;
  request.set_calibration_id(calibration_id);
  return CallUnary(*connection_, &Stub::DeleteCalibration, request, options).status();
}

absl::StatusOr<std::unique_ptr<ActivationStream>> CalibrationClient::OpenStream(
    const StreamOptions& stream, const CallOptions& options) const {
  const int64_t row_bytes =
      stream.features > kMaxRowBytes
          ? stream.features
          : stream.features * (DataTypeBytes(stream.x) + DataTypeBytes(stream.x_quantized));
  if (DataTypeBytes(stream.x) == 0) return Invalid("x", "expected a dtype");
  if (row_bytes < 1 || row_bytes > kMaxRowBytes) {
    return Invalid("x", absl::StrCat("expected rows of 1 to ", kMaxRowBytes,
                                     " bytes (a message carries whole rows), got ", stream.features,
                                     " features"));
  }
  if (stream.stream_id.empty()) return Invalid("stream_id", "expected 1 to 128 bytes, got none");
  if (stream.chunk_rows < 0 || stream.chunk_rows > kMaxRowBytes / row_bytes) {
    return Invalid("chunk_rows", absl::StrCat("expected 0 to ", kMaxRowBytes / row_bytes,
                                              ", what a message holds, got ", stream.chunk_rows));
  }
  if (stream.window_bytes < 0) return Invalid("window_bytes", "expected at least 0");
  const int64_t chunk_rows =
      stream.chunk_rows > 0 ? stream.chunk_rows : RowsInChunk(kChunkBytes, row_bytes);
  auto sender =
      std::make_unique<ActivationStream::Sender>(connection_, stream, chunk_rows, options);
  RETURN_IF_ERROR(sender->Open());
  return std::make_unique<ActivationStream>(std::move(sender));
}

absl::StatusOr<v1::StreamProgress> CalibrationClient::Accumulate(
    StreamOptions stream, const TensorView& x, const std::optional<TensorView>& x_quantized,
    const CallOptions& options) const {
  RETURN_IF_ERROR(CheckActivations(x, x_quantized));
  stream.features = x.shape[1];
  stream.expected_rows = x.shape[0];
  stream.x = x.dtype;
  stream.x_quantized = x_quantized.has_value() ? x_quantized->dtype : v1::DATA_TYPE_UNSPECIFIED;
  ASSIGN_OR_RETURN(const std::unique_ptr<ActivationStream> opened, OpenStream(stream, options));
  RETURN_IF_ERROR(opened->Write(x, x_quantized));
  return opened->Close();
}

absl::StatusOr<v1::ImportStatisticsResponse> CalibrationClient::Import(
    const std::string& calibration_id, const std::string& stream_id,
    const StatisticsView& statistics, const CallOptions& options) const {
  return ImportStatistics(*connection_, calibration_id, stream_id, statistics, options);
}

absl::StatusOr<Statistics> CalibrationClient::Export(const std::string& calibration_id,
                                                     v1::Portion portion, v1::MatrixLayout layout,
                                                     const CallOptions& options) const {
  return ExportStatistics(*connection_, calibration_id, portion, layout, options);
}

}  // namespace certiq
