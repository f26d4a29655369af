// The work of a stored job: weights from the store, the engine, the result to the store.

#include <algorithm>
#include <cstddef>
#include <span>
#include <utility>

#include "job/stored_job.h"
#include "runtime/throttle.h"

namespace certiq::server {

absl::StatusOr<engine::QuantizedLayer> StoredJob::Quantize(const JobRecord& record,
                                                           CallFacts& facts) {
  const std::shared_ptr<Calibration>& calibration = holdings_.calibration.get();
  const absl::StatusOr<CalibrationSums> sums = calibration->Sums();
  if (!sums.ok()) return sums.status();
  absl::StatusOr<engine::StripMatrix> weights = ReadWeights(record);
  if (!weights.ok()) return weights.status();
  const CalibrationRecord about = calibration->View(false).record;
  facts.calibration_id = about.id;
  facts.sums_sha256 = sums->sha256;
  facts.held_out_fraction = about.held_out_fraction;
  facts.held_out_block_rows = about.held_out_block_rows;
  const std::unique_ptr<engine::FactorCache> factors = calibration->Factors();
  engine::LayerProblem problem{spec_, *std::move(weights), sums->fit, sums->held_out,
                               factors.get()};
  ProgressGate gate;
  const engine::RunContext context{.executor = &env_.pool,
                                   .cancellation = cancellation_.get(),
                                   .progress = [this, &gate](engine::Phase phase, double fraction) {
                                     if (!gate.Passes(phase)) return;
                                     {
                                       const std::lock_guard lock(mu_);
                                       phase_ = phase;
                                       fraction_ = std::clamp(fraction, 0.0, 1.0);
                                     }
                                     NotifyAll();
                                   }};
  return engine::QuantizeLayer(std::move(problem), context);
}

absl::StatusOr<engine::StripMatrix> StoredJob::ReadWeights(const JobRecord& record) const {
  const auto reader = env_.store.OpenBlob(record.weights);
  if (!reader.ok()) return reader.status();
  const auto dtype = static_cast<engine::DType>(record.weight_dtype);
  const int64_t row_bytes = record.features * engine::ItemSize(dtype);
  const int64_t rows_at_once = std::max<int64_t>(1, kWeightReadBytes / row_bytes);
  engine::StripMatrix weights(record.rows, record.features);
  std::vector<std::byte> bytes;
  for (int64_t row = 0; row < record.rows; row += rows_at_once) {
    const int64_t rows = std::min(rows_at_once, record.rows - row);
    bytes.resize(static_cast<size_t>(rows * row_bytes));
    if (absl::Status read = (*reader)->Read(row * row_bytes, bytes); !read.ok()) return read;
    absl::Status decoded =
        engine::DecodeRows(dtype, bytes.data(), row, rows, "weight.data", weights);
    if (!decoded.ok()) return decoded;
  }
  return weights;
}

absl::Status StoredJob::WriteResult(const engine::QuantizedLayer& layer, const CallFacts& facts,
                                    JobRecord& record) const {
  auto writer = env_.store.CreateBlob();
  if (!writer.ok()) return writer.status();
  record.result_tensor_bytes = 0;
  for (const engine::ResultTensor& tensor : layer.tensors) {
    if (absl::Status written = (*writer)->Append(tensor.bytes); !written.ok()) return written;
    record.result_tensor_bytes += static_cast<int64_t>(tensor.bytes.size());
  }
  for (const std::string& part : codec_.EncodeCertificate(layer.certificate, facts)) {
    const auto length = static_cast<uint32_t>(part.size());
    absl::Status written = (*writer)->Append(std::as_bytes(std::span(&length, 1)));
    if (written.ok()) written = (*writer)->Append(std::as_bytes(std::span(part)));
    if (!written.ok()) return written;
  }
  absl::StatusOr<BlobRef> blob = (*writer)->Commit();
  if (!blob.ok()) return blob.status();
  record.result = *std::move(blob);
  record.result_header = codec_.EncodeHeader(layer.tensors);
  record.relative_error = layer.certificate.relative_error;
  record.lambda_used = layer.certificate.lambda_used;
  return absl::OkStatus();
}

}  // namespace certiq::server
