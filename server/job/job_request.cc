#include "job/job_request.h"

#include "absl/strings/str_cat.h"
#include "base/sha256.h"
#include "base/status.h"
#include "base/status_macros.h"
#include "contract/resolve_spec.h"
#include "contract/tensor_header.h"
#include "contract/time.h"

namespace certiq::server {
namespace {

using base::InvalidField;

// Held out where the damping rule needs tokens and the header says nothing.
constexpr double kDefaultHeldOut = 0.125;

// What both headers have.
template <typename Header>
absl::StatusOr<JobRequest> ReadCommon(const Header& header) {
  RETURN_IF_ERROR(CheckName("request_id", header.request_id(), kMaxRequestIdBytes));
  RETURN_IF_ERROR(CheckName("layer_name", header.layer_name(), kMaxNameBytes));
  JobRequest request;
  request.request_id = header.request_id();
  request.layer_name = header.layer_name();
  request.calibration_id = header.calibration_id();
  const v1::QuantizationSpec& spec = header.spec();
  if (const size_t bytes = spec.ByteSizeLong() - (spec.has_grid() ? spec.grid().ByteSizeLong() : 0);
      bytes > kMaxSpecBytes) {
    return InvalidField("spec", absl::StrCat("expected at most ", kMaxSpecBytes,
                                             " bytes beside the grid, got ", bytes, " bytes"));
  }
  request.spec_message = spec;
  ASSIGN_OR_RETURN(request.spec, ResolveSpec(header.spec()));
  ASSIGN_OR_RETURN(const MatrixShape weight,
                   ReadMatrix(header.has_weight(), header.weight(), "weight",
                              "[output channels, input features]"));
  request.rows = weight.rows;
  request.features = weight.columns;
  request.weight_dtype = weight.dtype;
  return request;
}

absl::StatusOr<Activations> ReadActivations(const v1::QuantizeHeader& header,
                                            const engine::ResolvedSpec& spec) {
  Activations activations;
  ASSIGN_OR_RETURN(const MatrixShape x,
                   ReadMatrix(header.has_x(), header.x(), "x", "[tokens, input features]"));
  activations.tokens = x.rows;
  activations.features = x.columns;
  activations.x_dtype = x.dtype;
  if (header.has_x_quantized()) {
    ASSIGN_OR_RETURN(
        const MatrixShape x_quantized,
        ReadMatrix(true, header.x_quantized(), "x_quantized", "[tokens, input features]"));
    activations.x_quantized_dtype = x_quantized.dtype;
    activations.quantized_tokens = x_quantized.rows;
    activations.quantized_features = x_quantized.columns;
  }
  if (header.has_held_out_fraction()) {
    activations.held_out_fraction = header.held_out_fraction();
  } else if (spec.NeedsHeldOut()) {
    activations.held_out_fraction = kDefaultHeldOut;
  }
  activations.sequence_rows = header.sequence_rows();
  return activations;
}

}  // namespace

absl::StatusOr<JobRequest> ReadJobRequest(const v1::QuantizeHeader& header) {
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
  ASSIGN_OR_RETURN(JobRequest request, ReadCommon(header));
  if (header.calibration_id().empty()) {
    ASSIGN_OR_RETURN(request.activations, ReadActivations(header, request.spec));
  } else if (header.has_x() || header.has_x_quantized() || header.has_held_out_fraction() ||
             header.sequence_rows() != 0) {
    return InvalidField("calibration_id",
                        "expected either a calibration, or x with how to hold rows out");
  }
  return request;
}

absl::StatusOr<JobRequest> ReadJobRequest(const v1::CreateJobHeader& header) {
  ASSIGN_OR_RETURN(JobRequest request, ReadCommon(header));
  if (header.calibration_id().empty()) {
    return InvalidField("calibration_id", "expected a calibration, got none");
  }
  ASSIGN_OR_RETURN(request.deadline_micros,
                   ReadDuration(header.has_deadline(), header.deadline(), "deadline", 1, 0));
  ASSIGN_OR_RETURN(request.ttl_micros,
                   ReadDuration(header.has_ttl(), header.ttl(), "ttl", kMicros, kDefaultTtlMicros));
  base::Sha256 digest;
  digest.Update(header.SerializeAsString());
  request.digest = digest.Finish();
  request.priority = header.priority();
  request.stored = true;
  return request;
}

}  // namespace certiq::server
