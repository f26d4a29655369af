#include "rpc/services/convert_job.h"

#include "base/sha256.h"
#include "base/status.h"
#include "contract/convert.h"
#include "contract/convert_time.h"
#include "contract/enums.h"
#include "contract/rpc_status.h"
#include "google/rpc/status.pb.h"

namespace certiq::server {

absl::StatusOr<JobRequest> FromProto(const v1::CreateJobHeader& header) {
  absl::Status names = FirstError({CheckName("request_id", header.request_id(), kMaxRequestIdBytes),
                                   CheckName("layer_name", header.layer_name(), kMaxNameBytes)});
  if (!names.ok()) return names;
  if (header.calibration_id().empty()) {
    return base::InvalidField("calibration_id", "expected a calibration, got none");
  }
  const absl::StatusOr<engine::QuantizationSpec> spec = FromProto(header.spec());
  if (!spec.ok()) return spec.status();
  absl::StatusOr<engine::ResolvedSpec> resolved = engine::ResolveSpec(*spec);
  if (!resolved.ok()) return resolved.status();
  const absl::StatusOr<MatrixShape> weight = ReadMatrix(
      header.has_weight(), header.weight(), "weight", "[output channels, input features]");
  if (!weight.ok()) return weight.status();
  const absl::StatusOr<int64_t> deadline =
      ReadDuration(header.has_deadline(), header.deadline(), "deadline", 1, 0);
  if (!deadline.ok()) return deadline.status();
  const absl::StatusOr<int64_t> ttl =
      ReadDuration(header.has_ttl(), header.ttl(), "ttl", kMicros, kDefaultTtlMicros);
  if (!ttl.ok()) return ttl.status();

  JobRequest to;
  to.request_id = header.request_id();
  base::Sha256 digest;
  digest.Update(header.SerializeAsString());
  to.digest = digest.Finish();
  to.layer_name = header.layer_name();
  to.calibration_id = header.calibration_id();
  to.stored_spec = header.spec().SerializeAsString();
  to.spec = *std::move(resolved);
  to.rows = weight->rows;
  to.features = weight->columns;
  to.weight_dtype = weight->dtype;
  to.priority = header.priority();
  to.deadline_micros = *deadline;
  to.ttl_micros = *ttl;
  return to;
}

v1::Job ToProto(const JobView& view) {
  const JobRecord& record = view.record;
  v1::Job to;
  to.set_id(record.id);
  to.set_state(ToWire(record.state, kJobStates));
  to.set_request_id(record.request_id);
  to.set_layer_name(record.layer_name);
  to.set_calibration_id(record.calibration_id);
  to.mutable_spec()->ParseFromString(record.spec);
  to.set_rows(record.rows);
  to.set_features(record.features);
  to.set_priority(record.priority);
  SetTime(record.create_time, to.mutable_create_time());
  if (record.start_time != 0) SetTime(record.start_time, to.mutable_start_time());
  if (record.deadline_time != 0) SetTime(record.deadline_time, to.mutable_deadline_time());
  if (record.end_time != 0) {
    SetTime(record.end_time, to.mutable_end_time());
    SetTime(record.end_time + record.ttl_micros, to.mutable_expire_time());
  }
  to.set_starts(record.starts);
  if (record.state == JobState::kRunning) {
    to.set_phase(ToProto(view.phase));
    to.set_fraction(view.fraction);
  }
  if (view.queue_position >= 0) to.set_queue_position(view.queue_position);
  if (!record.error.empty()) to.mutable_error()->ParseFromString(record.error);
  to.set_result_bytes(record.result_tensor_bytes);
  to.set_relative_error(record.relative_error);
  to.set_lambda_used(record.lambda_used);
  return to;
}

absl::StatusOr<engine::ResolvedSpec> JobCodec::DecodeSpec(const std::string& spec) const {
  v1::QuantizationSpec message;
  if (!message.ParseFromString(spec)) {
    return absl::DataLossError("the stored spec of the job does not parse");
  }
  const absl::StatusOr<engine::QuantizationSpec> read = FromProto(message);
  if (!read.ok()) return read.status();
  return engine::ResolveSpec(*read);
}

std::string JobCodec::EncodeError(const absl::Status& error) const {
  return ToRpcStatus(error).SerializeAsString();
}

std::string JobCodec::EncodeHeader(const std::vector<engine::ResultTensor>& tensors) const {
  return ToProto(tensors).SerializeAsString();
}

std::vector<std::string> JobCodec::EncodeCertificate(const engine::LayerCertificate& certificate,
                                                     const CallFacts& facts) const {
  std::vector<std::string> parts;
  for (const v1::Certificate& part : ToProto(certificate, facts)) {
    parts.push_back(part.SerializeAsString());
  }
  return parts;
}

}  // namespace certiq::server
