#include "statistics_calls.h"

#include <algorithm>
#include <optional>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "absl/strings/string_view.h"
#include "base/status_macros.h"
#include "certiq/status.h"
#include "retry_loop.h"

namespace certiq {
namespace {

// The largest calibration that the contract knows.
constexpr int64_t kMaxFeatures = 65'536;

template <typename... Parts>
absl::Status Broken(const Parts&... parts) {
  return absl::InternalError(absl::StrCat("the server's answer breaks the contract: ", parts...));
}

v1::StatisticsHeader HeaderFor(const std::string& calibration_id, const std::string& stream_id,
                               const StatisticsView& statistics, const StatisticsShape& shape) {
  v1::StatisticsHeader header;
  header.set_calibration_id(calibration_id);
  header.set_stream_id(stream_id);
  header.set_tokens(statistics.tokens);
  header.set_portion(statistics.portion);
  header.set_dtype(shape.dtype);
  header.set_layout(shape.layout);
  header.set_features(shape.features);
  header.set_kind(shape.kind);
  return header;
}

// Assembles and validates an export. Memory grows with the bytes that come, not with what the
// header announces.
class StatisticsCollector {
 public:
  StatisticsCollector(v1::Portion portion, v1::MatrixLayout layout)
      : portion_(portion), layout_(layout) {}

  absl::Status Add(const v1::ExportStatisticsResponse& frame) {
    if (frame.has_header()) return AddHeader(frame.header());
    if (!frame.has_data()) return Broken("frame: expected a payload, got none");
    if (sums_.empty()) return Broken("data: expected the header first");
    absl::string_view rest = frame.data();
    for (OwnedTensor& sum : sums_) {
      const size_t room = Bytes(sum) - sum.data.size();
      sum.data.append(rest.data(), std::min(room, rest.size()));
      rest.remove_prefix(std::min(room, rest.size()));
    }
    return rest.empty() ? absl::OkStatus() : Broken("data: expected ", rest.size(), " bytes less");
  }

  absl::StatusOr<Statistics> Finish() && {
    if (sums_.empty()) return absl::DataLossError("the server ended the call without statistics");
    for (const OwnedTensor& sum : sums_) {
      if (Bytes(sum) != sum.data.size()) {
        return absl::DataLossError(absl::StrCat("the server ended the call within \"", sum.name,
                                                "\": expected ", Bytes(sum), " bytes, got ",
                                                sum.data.size()));
      }
    }
    Statistics statistics{.tokens = tokens_, .portion = portion_, .gram = std::move(sums_[0])};
    if (sums_.size() > 1) {
      statistics.gram_quantized = std::move(sums_[1]);
      statistics.cross = std::move(sums_[2]);
    }
    return statistics;
  }

 private:
  // The size that the header announced, whose shape was checked.
  static size_t Bytes(const OwnedTensor& sum) {
    return static_cast<size_t>(TensorBytes(sum.dtype, sum.shape).value());
  }

  absl::Status AddHeader(const v1::StatisticsHeader& header) {
    if (!sums_.empty()) return Broken("header: expected one, got a second one");
    const int64_t n = header.features();
    if (n < 1 || n > kMaxFeatures || header.tokens() < 0 || header.dtype() != v1::DATA_TYPE_F64 ||
        header.layout() != layout_ || header.portion() != portion_) {
      return Broken("header: expected F64 sums of the portion and layout asked for, got ",
                    header.ShortDebugString());
    }
    tokens_ = header.tokens();
    const std::vector<int64_t> symmetric = layout_ == v1::MATRIX_LAYOUT_UPPER
                                               ? std::vector<int64_t>{n * (n + 1) / 2}
                                               : std::vector<int64_t>{n, n};
    sums_.push_back({"gram", v1::DATA_TYPE_F64, symmetric, {}});
    if (header.kind() == v1::CALIBRATION_KIND_MISMATCHED) {
      sums_.push_back({"gram_quantized", v1::DATA_TYPE_F64, symmetric, {}});
      sums_.push_back({"cross", v1::DATA_TYPE_F64, {n, n}, {}});
    }
    return absl::OkStatus();
  }

  const v1::Portion portion_;
  const v1::MatrixLayout layout_;
  int64_t tokens_ = 0;
  std::vector<OwnedTensor> sums_;
};

}  // namespace

absl::StatusOr<v1::ImportStatisticsResponse> ImportStatistics(
    const CalibrationConnection& connection, const std::string& calibration_id,
    const std::string& stream_id, const StatisticsView& statistics, const CallOptions& options) {
  ASSIGN_OR_RETURN(const StatisticsShape shape, ShapeOf(statistics));
  if (statistics.tokens < 1) {
    return FieldError(absl::StatusCode::kInvalidArgument, "tokens",
                      absl::StrCat("expected at least 1, got ", statistics.tokens));
  }
  std::vector<absl::string_view> sums = {statistics.gram.data};
  if (statistics.cross.has_value()) {
    sums.push_back(statistics.gram_quantized->data);
    sums.push_back(statistics.cross->data);
  }
  int64_t total = 0;
  for (const absl::string_view sum : sums) total += static_cast<int64_t>(sum.size());
  v1::ImportStatisticsRequest first;
  *first.mutable_header() = HeaderFor(calibration_id, stream_id, statistics, shape);
  // Whole elements of 8 bytes or fewer.
  const auto piece =
      static_cast<size_t>(std::max<int64_t>(8, connection.options.chunk_bytes / 8 * 8));
  v1::ImportStatisticsResponse response;
  const absl::Status status =
      RunRetryLoop(connection.options, options, [&](absl::Time deadline) -> AttemptOutcome {
        CallContext context(deadline, options.cancel);
        response.Clear();
        const auto stream = connection.stub->ImportStatistics(context.get(), &response);
        // A write that fails means that the server has ended the call; Finish says why.
        const bool wrote = stream->Write(first);
        bool taking = wrote;
        int64_t sent = 0;
        v1::ImportStatisticsRequest frame;
        for (absl::string_view rest : sums) {
          while (taking && !rest.empty()) {
            const absl::string_view data = rest.substr(0, piece);
            rest.remove_prefix(data.size());
            frame.mutable_data()->assign(data.data(), data.size());
            taking = stream->Write(frame);
            sent += static_cast<int64_t>(data.size());
            if (options.progress) {
              options.progress(UploadProgress{.bytes = sent, .total_bytes = total});
            }
          }
        }
        stream->WritesDone();
        return context.Outcome(stream->Finish(), wrote);
      });
  RETURN_IF_ERROR(status);
  return response;
}

absl::StatusOr<Statistics> ExportStatistics(const CalibrationConnection& connection,
                                            const std::string& calibration_id, v1::Portion portion,
                                            v1::MatrixLayout layout, const CallOptions& options) {
  v1::ExportStatisticsRequest request;
  request.set_calibration_id(calibration_id);
  request.set_portion(portion);
  request.set_layout(layout);
  std::optional<StatisticsCollector> collector;
  const absl::Status status =
      RunRetryLoop(connection.options, options, [&](absl::Time deadline) -> AttemptOutcome {
        CallContext context(deadline, options.cancel);
        collector.emplace(portion, layout);
        const auto stream = connection.stub->ExportStatistics(context.get(), request);
        v1::ExportStatisticsResponse frame;
        absl::Status read_error;
        bool came = false;
        while (stream->Read(&frame)) {
          came = true;
          if (read_error.ok()) read_error = collector->Add(frame);
          if (!read_error.ok()) context.get()->TryCancel();
        }
        AttemptOutcome outcome = context.Outcome(stream->Finish(), came);
        if (!read_error.ok()) {
          outcome.status = read_error;
          outcome.local = true;
        }
        return outcome;
      });
  RETURN_IF_ERROR(status);
  return std::move(*collector).Finish();
}

}  // namespace certiq
