// The upload of a layer: weights and activations, piece by piece, checked as they come.

#ifndef CERTIQ_JOB_UPLOAD_H_
#define CERTIQ_JOB_UPLOAD_H_

#include <chrono>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <optional>
#include <span>

#include "absl/status/status.h"
#include "base/sha256.h"
#include "calibration/environment.h"
#include "calibration/split_accumulator.h"
#include "contract/certificate.h"
#include "engine/gram/held_out_split.h"
#include "engine/kernels/strip_matrix.h"
#include "engine/run_context.h"
#include "job/admission.h"
#include "job/job_request.h"
#include "store/blobs.h"

namespace certiq::server {

// Weights of a stored job go into the blob store, those of another into memory, where its
// activations become sums. What is not finished leaves no trace. Errors are INVALID_ARGUMENT about
// a field of the request unless said otherwise; after one the upload is of no use. Touches the
// disk. Not thread-safe.
class Upload {
 public:
  // `existing`: a stored job that the same request made before; nothing is kept, the weights are
  // compared. The environment and `cancellation` outlive the upload.
  Upload(const Environment& environment, JobRequest request, Admission admission,
         const engine::Cancellation& cancellation, std::optional<JobRecord> existing);

  // Takes whole rows, which start at `row_offset`: the rows sent before. RESOURCE_EXHAUSTED where
  // memory or the disk runs out.
  absl::Status AppendWeights(int64_t row_offset, std::span<const std::byte> bytes);
  // Rows of X and, where X~ was announced, the same rows of X~. The reason of the cancellation,
  // within a block of rows, where it asks to stop.
  absl::Status AppendActivations(int64_t row_offset, std::span<const std::byte> x,
                                 std::span<const std::byte> x_quantized);
  // Checks that everything announced has come, and makes the digests.
  absl::Status Finish();

  // The share of all rows announced that came.
  double fraction() const;
  const JobRequest& request() const { return request_; }
  // Parts that the job takes over, after Finish.
  Admission& admission() { return admission_; }
  const std::optional<JobRecord>& existing() const { return existing_; }
  // The facts of a certificate that the upload knows.
  const CertificateFacts& facts() const { return facts_; }

  // The blob of a stored job's weights.
  absl::StatusOr<BlobRef> CommitWeights() { return writer_->Commit(); }
  // The weights of another job, and its sums where it brought its own X.
  engine::StripMatrix TakeWeights() { return std::move(weights_); }
  SplitSums TakeSums();

 private:
  absl::Status Allocate();
  absl::Status StoreWeights(int64_t rows, std::span<const std::byte> bytes);

  const Environment& env_;
  const JobRequest request_;
  // Declared before what it pays for, so that it is given back after.
  Admission admission_;
  const engine::Cancellation& cancellation_;
  const std::optional<JobRecord> existing_;
  const std::chrono::steady_clock::time_point started_ = std::chrono::steady_clock::now();
  const engine::HeldOutSplit split_;

  int64_t weight_rows_ = 0;
  int64_t x_rows_ = 0;
  std::unique_ptr<BlobWriter> writer_;
  engine::StripMatrix weights_;
  std::optional<SplitAccumulator> sums_;
  base::Sha256 weights_digest_;
  base::Sha256 x_digest_;
  base::Sha256 x_quantized_digest_;
  CertificateFacts facts_;
};

}  // namespace certiq::server

#endif  // CERTIQ_JOB_UPLOAD_H_
