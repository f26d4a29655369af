#include "job/upload.h"

#include <new>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "base/status.h"
#include "base/status_macros.h"

namespace certiq::server {
namespace {

using base::InvalidField;

absl::string_view AsText(std::span<const std::byte> bytes) {
  return {reinterpret_cast<const char*>(bytes.data()), bytes.size()};
}

engine::HeldOutSplit SplitOf(const JobRequest& request) {
  if (!request.activations.has_value()) return {};
  const Activations& x = *request.activations;
  return {x.held_out_fraction,
          engine::HeldOutBlockRows(x.tokens, x.held_out_fraction, x.sequence_rows), ""};
}

}  // namespace

Upload::Upload(const Environment& environment, JobRequest request, Admission admission,
               const engine::Cancellation& cancellation, std::optional<JobRecord> existing)
    : env_(environment),
      request_(std::move(request)),
      admission_(std::move(admission)),
      cancellation_(cancellation),
      existing_(std::move(existing)),
      split_(SplitOf(request_)) {}

absl::Status Upload::Allocate() {
  if (request_.stored) {
    if (writer_ == nullptr && !existing_.has_value()) {
      ASSIGN_OR_RETURN(writer_, env_.storage.blobs->Create());
    }
    return absl::OkStatus();
  }
  if (weights_.rows() > 0) return absl::OkStatus();
  try {
    weights_ = engine::StripMatrix(request_.rows, request_.features);
    if (request_.activations.has_value()) {
      sums_.emplace(request_.features, request_.activations->x_quantized_dtype.has_value(),
                    request_.activations->held_out_fraction > 0);
    }
  } catch (const std::bad_alloc&) {
    absl::Status status = absl::ResourceExhaustedError(
        "the system has less memory than this server's budget promises");
    base::SetRetryAfter(status, base::kRetrySoon);
    return status;
  }
  return absl::OkStatus();
}

absl::Status Upload::StoreWeights(int64_t rows, std::span<const std::byte> bytes) {
  const int64_t row_bytes = request_.features * engine::ItemSize(request_.weight_dtype);
  for (int64_t r = 0; r < rows; ++r) {
    const std::byte* const row = bytes.data() + r * row_bytes;
    const int64_t bad = engine::FindNonFinite(request_.weight_dtype, row, request_.features);
    if (bad < 0) continue;
    std::vector<float> values(static_cast<size_t>(request_.features));
    engine::DecodeToFloat(request_.weight_dtype, row, request_.features, values.data());
    return base::NonFiniteValue("weight.data", values[static_cast<size_t>(bad)], weight_rows_ + r,
                                bad);
  }
  return writer_ == nullptr ? absl::OkStatus() : writer_->Append(bytes);
}

absl::Status Upload::AppendWeights(int64_t row_offset, std::span<const std::byte> bytes) {
  const int64_t row_bytes = request_.features * engine::ItemSize(request_.weight_dtype);
  ASSIGN_OR_RETURN(const int64_t rows,
                   RowsIn("weight", "weight.data", row_bytes, row_offset, weight_rows_,
                          request_.rows, static_cast<int64_t>(bytes.size())));
  RETURN_IF_ERROR(Allocate());
  if (request_.stored) {
    RETURN_IF_ERROR(StoreWeights(rows, bytes));
  } else {
    RETURN_IF_ERROR(engine::DecodeRows(request_.weight_dtype, bytes.data(), weight_rows_, rows,
                                       "weight.data", weights_));
  }
  weights_digest_.Update(AsText(bytes));
  weight_rows_ += rows;
  return absl::OkStatus();
}

absl::Status Upload::AppendActivations(int64_t row_offset, std::span<const std::byte> x,
                                       std::span<const std::byte> x_quantized) {
  if (!request_.activations.has_value()) {
    return InvalidField("payload", "expected weights only, as the header names a calibration");
  }
  const Activations& announced = *request_.activations;
  const int64_t row_bytes = request_.features * engine::ItemSize(announced.x_dtype);
  ASSIGN_OR_RETURN(const int64_t rows,
                   RowsIn("activation", "activation.x", row_bytes, row_offset, x_rows_,
                          announced.tokens, static_cast<int64_t>(x.size())));
  const bool mismatched = announced.x_quantized_dtype.has_value();
  const engine::DType x_quantized_dtype = announced.x_quantized_dtype.value_or(engine::DType::kF32);
  const int64_t quantized_bytes =
      mismatched ? rows * request_.features * engine::ItemSize(x_quantized_dtype) : 0;
  if (static_cast<int64_t>(x_quantized.size()) != quantized_bytes) {
    return InvalidField("activation.x_quantized",
                        mismatched
                            ? absl::StrCat("expected the ", rows, " rows of x, ", quantized_bytes,
                                           " bytes, got ", x_quantized.size(), " bytes")
                            : absl::StrCat("expected none as the header announced none, got ",
                                           x_quantized.size(), " bytes"));
  }
  RETURN_IF_ERROR(Allocate());
  const engine::TokenRows inputs{announced.x_dtype, x.data(), "activation.x"};
  const engine::TokenRows quantized_inputs{x_quantized_dtype, x_quantized.data(),
                                           "activation.x_quantized"};
  // What fails leaves the sums unusable; the call ends, and nothing has used them.
  RETURN_IF_ERROR(sums_
                      ->Append(inputs, mismatched ? &quantized_inputs : nullptr, x_rows_, rows,
                               request_.features, split_, env_.pool, &cancellation_)
                      .status());
  x_digest_.Update(AsText(x));
  x_quantized_digest_.Update(AsText(x_quantized));
  x_rows_ += rows;
  env_.observer.ActivationsFolded(rows, request_.features,
                                  static_cast<int64_t>(x.size() + x_quantized.size()));
  return absl::OkStatus();
}

double Upload::fraction() const {
  const auto share = [this](int64_t rows, engine::DType dtype) {
    return static_cast<double>(rows) * static_cast<double>(request_.features) *
           static_cast<double>(engine::ItemSize(dtype));
  };
  double came = share(weight_rows_, request_.weight_dtype);
  double announced = share(request_.rows, request_.weight_dtype);
  if (request_.activations.has_value()) {
    came += share(x_rows_, request_.activations->x_dtype);
    announced += share(request_.activations->tokens, request_.activations->x_dtype);
  }
  return came / announced;
}

absl::Status Upload::Finish() {
  if (weight_rows_ != request_.rows) {
    return InvalidField("weight", absl::StrCat("expected ", request_.rows, " rows, got ",
                                               weight_rows_, " when the stream ended"));
  }
  facts_.weights_sha256 = weights_digest_.Finish();
  if (request_.activations.has_value()) {
    const Activations& announced = *request_.activations;
    if (x_rows_ != announced.tokens) {
      return InvalidField("x", absl::StrCat("expected ", announced.tokens, " rows, got ", x_rows_,
                                            " when the stream ended"));
    }
    facts_.x_sha256 = x_digest_.Finish();
    if (announced.x_quantized_dtype.has_value()) {
      facts_.x_quantized_sha256 = x_quantized_digest_.Finish();
    }
    facts_.held_out_fraction = split_.fraction();
    facts_.held_out_block_rows = split_.block_rows();
  }
  facts_.receive_seconds =
      std::chrono::duration<double>(std::chrono::steady_clock::now() - started_).count();
  return absl::OkStatus();
}

SplitSums Upload::TakeSums() {
  SplitSums sums = std::move(*sums_).Finish(env_.pool);
  sums_.reset();
  return sums;
}

}  // namespace certiq::server
