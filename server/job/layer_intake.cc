#include "job/layer_intake.h"

#include <algorithm>
#include <new>
#include <utility>

#include "absl/strings/str_cat.h"
#include "base/status.h"

namespace certiq::server {
namespace {

using base::InvalidField;

absl::Status CheckSize(const char* field, const char* what, int64_t value, int64_t limit) {
  if (value >= 1 && value <= limit) return absl::OkStatus();
  return InvalidField(field, absl::StrCat("expected 1 to ", limit, " ", what, ", got ", value));
}

absl::Status CheckSizes(const LayerRequest& request) {
  absl::Status weight = CheckWeight(request.rows, request.features, request.weight_dtype);
  if (!weight.ok() || request.calibration != nullptr) return weight;
  absl::Status tokens = CheckSize("x.shape", "rows (tokens)", request.tokens, kMaxTokens);
  if (!tokens.ok()) return tokens;
  if (request.x_features != request.features) {
    return InvalidField(
        "x.shape", absl::StrCat("expected [tokens, ", request.features, "] as the weights have ",
                                request.features, " input features, got [", request.tokens, ", ",
                                request.x_features, "]"));
  }
  if (request.mismatched() && (request.x_quantized_tokens != request.tokens ||
                               request.x_quantized_features != request.x_features)) {
    return InvalidField(
        "x_quantized.shape",
        absl::StrCat("expected [", request.tokens, ", ", request.x_features, "] as x, got [",
                     request.x_quantized_tokens, ", ", request.x_quantized_features, "]"));
  }
  return absl::OkStatus();
}

// Bytes of the largest message that brings rows of this layer.
int64_t LargestMessage(const LayerRequest& request) {
  const int64_t weight = request.rows * request.features * engine::ItemSize(request.weight_dtype);
  const int64_t x_row_bytes =
      engine::ItemSize(request.x_dtype) +
      (request.mismatched() ? engine::ItemSize(*request.x_quantized_dtype) : 0);
  const int64_t x =
      request.calibration != nullptr ? 0 : request.tokens * request.features * x_row_bytes;
  // Field numbers, lengths and offsets come on top of the rows.
  constexpr int64_t kFraming = 64;
  return std::min(kMaxMessageBytes, std::max(weight, x) + kFraming);
}

int64_t EngineBytes(const LayerRequest& request) {
  return engine::PeakBytes(request.spec, request.rows, request.features, request.mismatched(),
                           request.held_out_fraction > 0);
}

}  // namespace

absl::Status CheckWeight(int64_t rows, int64_t features, engine::DType dtype) {
  for (absl::Status status :
       {CheckSize("weight.shape", "rows (output channels)", rows, kMaxRows),
        CheckSize("weight.shape", "columns (input features)", features, kMaxFeatures)}) {
    if (!status.ok()) return status;
  }
  int64_t weights = 0;
  if (__builtin_mul_overflow(rows, features, &weights) || weights > kMaxWeights) {
    return InvalidField("weight.shape", absl::StrCat("expected at most ", kMaxWeights,
                                                     " elements, got ", rows, " x ", features));
  }
  if (engine::IsFloating(dtype)) return absl::OkStatus();
  return InvalidField("weight.dtype",
                      absl::StrCat("expected a floating type, got ", engine::Name(dtype)));
}

absl::StatusOr<int64_t> RowsIn(absl::string_view chunk, absl::string_view data, int64_t row_bytes,
                               int64_t row_offset, int64_t rows_before, int64_t rows_in_all,
                               int64_t bytes) {
  if (row_offset != rows_before) {
    return InvalidField(
        absl::StrCat(chunk, ".row_offset"),
        absl::StrCat("expected ", rows_before, ", the rows sent before, got ", row_offset));
  }
  if (bytes == 0 || bytes % row_bytes != 0) {
    return InvalidField(data, absl::StrCat("expected whole rows of ", row_bytes,
                                           " bytes, at least one, got ", bytes, " bytes"));
  }
  const int64_t rows = bytes / row_bytes;
  if (rows > rows_in_all - rows_before) {
    return InvalidField(
        data, absl::StrCat("expected at most the ", rows_in_all - rows_before,
                           " rows that are left of the shape's ", rows_in_all, ", got ", rows));
  }
  return rows;
}

int64_t LayerIntake::BytesFor(const LayerRequest& request) {
  // Staging of the sums is gone before the engine starts, so it is one or the other.
  const int64_t sums =
      engine::StatisticsAccumulator::BytesFor(request.features, request.mismatched());
  const int64_t portions = request.calibration != nullptr  ? 0
                           : request.held_out_fraction > 0 ? 2
                                                           : 1;
  const int64_t intake =
      engine::StripMatrix::BytesFor(request.rows, request.features) + portions * sums;
  return std::max(intake, EngineBytes(request)) + kMessagesHeld * LargestMessage(request);
}

absl::StatusOr<std::unique_ptr<LayerIntake>> LayerIntake::Create(
    const LayerRequest& request, ByteBudget& budget, engine::Executor& executor,
    const engine::Cancellation& cancelled, Observer& observer) {
  if (absl::Status sizes = CheckSizes(request); !sizes.ok()) return sizes;
  absl::StatusOr<ByteBudget::Reservation> reservation =
      budget.TryReserve(BytesFor(request), "this layer");
  if (!reservation.ok()) return reservation.status();
  // The constructor is private, so std::make_unique cannot reach it.
  return std::unique_ptr<LayerIntake>(
      new LayerIntake(request, *std::move(reservation), executor, cancelled, observer));
}

absl::Status LayerIntake::Allocate() {
  if (weights_.rows() > 0) return absl::OkStatus();
  try {
    weights_ = engine::StripMatrix(request_.rows, request_.features);
    if (request_.calibration != nullptr) return absl::OkStatus();
    statistics_.emplace(request_.features, request_.mismatched());
    if (request_.held_out_fraction > 0) {
      held_out_.emplace(request_.features, request_.mismatched());
    }
  } catch (const std::bad_alloc&) {
    absl::Status status = absl::ResourceExhaustedError(
        "the system has less memory than this server's budget promises");
    base::SetRetryAfter(status, base::kRetrySoon);
    return status;
  }
  return absl::OkStatus();
}

absl::Status LayerIntake::AppendWeights(int64_t row_offset, std::span<const std::byte> bytes) {
  const int64_t row_bytes = request_.features * engine::ItemSize(request_.weight_dtype);
  const absl::StatusOr<int64_t> rows =
      RowsIn("weight", "weight.data", row_bytes, row_offset, weight_rows_, request_.rows,
             static_cast<int64_t>(bytes.size()));
  if (!rows.ok()) return rows.status();
  if (absl::Status allocated = Allocate(); !allocated.ok()) return allocated;
  absl::Status decoded = engine::DecodeRows(request_.weight_dtype, bytes.data(), weight_rows_,
                                            *rows, "weight.data", weights_);
  if (decoded.ok()) weight_rows_ += *rows;
  return decoded;
}

absl::Status LayerIntake::AppendActivations(int64_t row_offset, std::span<const std::byte> x,
                                            std::span<const std::byte> x_quantized) {
  if (request_.calibration != nullptr) {
    return InvalidField("payload", "expected weights only, as the header names a calibration");
  }
  const int64_t row_bytes = request_.features * engine::ItemSize(request_.x_dtype);
  const absl::StatusOr<int64_t> rows =
      RowsIn("activation", "activation.x", row_bytes, row_offset, x_rows_, request_.tokens,
             static_cast<int64_t>(x.size()));
  if (!rows.ok()) return rows.status();
  const int64_t quantized_row_bytes =
      request_.mismatched() ? request_.features * engine::ItemSize(*request_.x_quantized_dtype) : 0;
  if (static_cast<int64_t>(x_quantized.size()) != *rows * quantized_row_bytes) {
    return InvalidField(
        "activation.x_quantized",
        request_.mismatched()
            ? absl::StrCat("expected the ", *rows, " rows of x, ", *rows * quantized_row_bytes,
                           " bytes, got ", x_quantized.size(), " bytes")
            : absl::StrCat("expected none as the header announced none, got ", x_quantized.size(),
                           " bytes"));
  }
  if (absl::Status allocated = Allocate(); !allocated.ok()) return allocated;
  // A message can bring seconds of work: look up once a block.
  int64_t begin = 0;
  while (begin < *rows) {
    if (cancelled_.cancelled()) return cancelled_.status();
    const int64_t first_row = x_rows_ + begin;
    const int64_t block = std::min({engine::StatisticsAccumulator::kBlockRows, *rows - begin,
                                    split_.BlockEnd(first_row) - first_row});
    absl::Status folded = FoldBlock(
        first_row, block, x.data() + begin * row_bytes,
        request_.mismatched() ? x_quantized.data() + begin * quantized_row_bytes : nullptr);
    if (!folded.ok()) return folded;
    begin += block;
  }
  x_rows_ += *rows;
  observer_.ActivationsFolded(*rows, request_.features,
                              static_cast<int64_t>(x.size() + x_quantized.size()));
  return absl::OkStatus();
}

absl::Status LayerIntake::FoldBlock(int64_t first_row, int64_t rows, const std::byte* x,
                                    const std::byte* x_quantized) {
  engine::StatisticsAccumulator& sums = split_.IsHeldOut(first_row) ? *held_out_ : *statistics_;
  if (!request_.mismatched()) {
    return sums.Append({request_.x_dtype, x, "activation.x"}, first_row, rows, executor_);
  }
  return sums.AppendPair({request_.x_dtype, x, "activation.x"},
                         {*request_.x_quantized_dtype, x_quantized, "activation.x_quantized"},
                         first_row, rows, executor_);
}

double LayerIntake::fraction() const {
  const auto share = [this](int64_t rows, engine::DType dtype) {
    return static_cast<double>(rows) * static_cast<double>(request_.features) *
           static_cast<double>(engine::ItemSize(dtype));
  };
  const int64_t tokens = request_.calibration != nullptr ? 0 : request_.tokens;
  return (share(weight_rows_, request_.weight_dtype) + share(x_rows_, request_.x_dtype)) /
         (share(request_.rows, request_.weight_dtype) + share(tokens, request_.x_dtype));
}

absl::StatusOr<ReadyLayer> LayerIntake::Finish() {
  if (weight_rows_ != request_.rows) {
    return InvalidField("weight", absl::StrCat("expected ", request_.rows, " rows, got ",
                                               weight_rows_, " when the stream ended"));
  }
  if (request_.calibration == nullptr && x_rows_ != request_.tokens) {
    return InvalidField("x", absl::StrCat("expected ", request_.tokens, " rows, got ", x_rows_,
                                          " when the stream ended"));
  }
  ReadyLayer layer;
  layer.problem.spec = request_.spec;
  layer.problem.weights = std::move(weights_);
  layer.reservation = std::move(reservation_);
  if (request_.calibration != nullptr) {
    absl::StatusOr<Calibration::Pin> pin = request_.calibration->PinFinalized();
    if (!pin.ok()) return pin.status();
    layer.calibration = *std::move(pin);
    layer.reservation.ShrinkTo(EngineBytes(request_));
    return layer;
  }
  layer.problem.statistics =
      std::make_shared<const engine::Statistics>(std::move(*statistics_).Finish(executor_));
  statistics_.reset();
  if (held_out_.has_value()) {
    layer.problem.held_out =
        std::make_shared<const engine::Statistics>(std::move(*held_out_).Finish(executor_));
    held_out_.reset();
  }
  // No further messages come, and the staging is gone.
  layer.reservation.ShrinkTo(EngineBytes(request_));
  return layer;
}

}  // namespace certiq::server
