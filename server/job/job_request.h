// Requests for a job, as Quantize and CreateJob make them.

#ifndef CERTIQ_JOB_JOB_REQUEST_H_
#define CERTIQ_JOB_JOB_REQUEST_H_

#include <cstdint>
#include <optional>
#include <string>

#include "absl/status/statusor.h"
#include "certiq/v1/job_service.pb.h"
#include "certiq/v1/quantization_service.pb.h"
#include "contract/limits.h"
#include "engine/kernels/dtype.h"
#include "engine/spec.h"

namespace certiq::server {

// Activations that are sent with the weights, instead of a calibration.
struct Activations {
  // X [tokens, features].
  int64_t tokens = 0;
  int64_t features = 0;
  engine::DType x_dtype = engine::DType::kF32;
  // X~ [quantized_tokens, quantized_features], where it is sent at all.
  std::optional<engine::DType> x_quantized_dtype;
  int64_t quantized_tokens = 0;
  int64_t quantized_features = 0;
  // The share of the rows that is kept out of the fit, in [0, 0.5].
  double held_out_fraction = 0;
  // Rows of one sequence, 0: unknown.
  int64_t sequence_rows = 0;
};

// A job as its header asks for it; sizes are checked by Admit (admission.h).
struct JobRequest {
  std::string request_id;
  // The SHA-256 of the header's content, empty where the job is not stored; the weights have their
  // own.
  std::string digest;
  std::string layer_name;
  // Empty where the layer brings its activations.
  std::string calibration_id;
  std::optional<Activations> activations;
  // The spec as it came and as it was understood.
  v1::QuantizationSpec spec_message;
  engine::ResolvedSpec spec;
  // W [rows, features].
  int64_t rows = 0;
  int64_t features = 0;
  engine::DType weight_dtype = engine::DType::kF32;
  int32_t priority = 0;
  // 0: none.
  int64_t deadline_micros = 0;
  int64_t ttl_micros = kDefaultTtlMicros;
  // Whether the job outlives the call that asks for it.
  bool stored = false;
};

// INVALID_ARGUMENT or UNIMPLEMENTED naming the field, what was expected and what came.
absl::StatusOr<JobRequest> ReadJobRequest(const v1::QuantizeHeader& header);
absl::StatusOr<JobRequest> ReadJobRequest(const v1::CreateJobHeader& header);

}  // namespace certiq::server

#endif  // CERTIQ_JOB_JOB_REQUEST_H_
