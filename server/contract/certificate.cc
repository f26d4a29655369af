#include "contract/certificate.h"

#include <algorithm>
#include <cstddef>
#include <optional>
#include <vector>

#include "contract/enums.h"
#include "contract/loads_in.h"
#include "contract/resolve_spec.h"
#include "engine/quantize_layer.h"

namespace certiq::server {
namespace {

// Appends what there is of [begin, end) of `from` to a repeated field.
void AppendRange(const std::vector<double>& from, size_t begin, size_t end,
                 google::protobuf::RepeatedField<double>* to) {
  begin = std::min(begin, from.size());
  end = std::min(end, from.size());
  to->Add(from.begin() + static_cast<std::ptrdiff_t>(begin),
          from.begin() + static_cast<std::ptrdiff_t>(end));
}

template <typename T, typename Setter>
void SetIfPresent(const std::optional<T>& value, Setter set) {
  if (value.has_value()) set(*value);
}

// Everything but the rows.
v1::Certificate Summary(const engine::LayerCertificate& from, const CertificateFacts& facts) {
  v1::Certificate to;
  to.set_schema_version(1);
  to.set_engine_version(engine::EngineVersion());
  to.set_isa(engine::EngineIsa());
  to.set_weights_sha256(facts.weights_sha256);
  to.set_x_sha256(facts.x_sha256);
  to.set_x_quantized_sha256(facts.x_quantized_sha256);
  to.set_rows(from.rows);
  to.set_features(from.features);
  to.set_tokens(from.tokens);
  to.set_method(ToWire(from.spec.method, kMethods));
  to.set_bits(from.spec.bits);
  to.set_symmetric(from.spec.symmetric);
  to.set_group_size(static_cast<int32_t>(from.spec.group_size));
  to.set_outcome(ToWire(from.outcome, kOutcomes));
  for (const std::string& warning : from.warnings) to.add_warnings(warning);
  to.set_seed(from.spec.seed);
  to.set_bits_per_weight(from.bits_per_weight);
  to.set_lambda_requested(from.lambda_requested);
  to.set_lambda_used(from.lambda_used);
  for (const engine::DampingAttempt& attempt : from.damping_attempts) {
    v1::DampingAttempt* const entry = to.add_damping_attempts();
    entry->set_lambda(attempt.lambda);
    entry->set_cause(ToWire(attempt.cause, kCauses));
    entry->set_detail(attempt.detail);
  }
  to.set_condition_estimate(from.condition_estimate);
  to.set_squared_error(from.squared_error);
  to.set_damped_squared_error(from.damped_squared_error);
  to.set_reference_energy(from.reference_energy);
  to.set_relative_error(from.relative_error);
  SetIfPresent(from.nearest_relative_error, [&](double v) { to.set_nearest_relative_error(v); });
  to.set_l2_bound(from.l2_bound);
  to.set_squared_error_rounding(from.squared_error_rounding);
  to.set_reference_energy_rounding(from.reference_energy_rounding);
  to.set_identity_residual(from.identity_residual);
  to.set_c2(from.c2);
  to.set_c_inf(from.c_inf);
  to.set_clipped_weights(from.clipped_weights);
  to.set_clipped_rows(from.clipped_rows);
  to.set_worst_overshoot(from.worst_overshoot);
  to.set_dead_features(from.dead_features);
  SetIfPresent(from.predicted_squared_error, [&](double v) { to.set_predicted_squared_error(v); });
  SetIfPresent(from.rate_gap_bits, [&](double v) { to.set_rate_gap_bits(v); });
  SetIfPresent(from.bits_needed, [&](int32_t v) { to.set_bits_needed(v); });
  SetIfPresent(from.linf_bound, [&](double v) { to.set_linf_bound(v); });
  SetIfPresent(from.linf_probability, [&](double v) { to.set_linf_probability(v); });
  SetIfPresent(from.qronos_initial, [&](double v) { to.set_qronos_initial(v); });
  SetIfPresent(from.optq_initial, [&](double v) { to.set_optq_initial(v); });
  SetIfPresent(from.floor, [&](double v) { to.set_floor(v); });
  to.set_held_out_tokens(from.held_out_tokens);
  to.set_held_out_rows(from.held_out_rows);
  SetIfPresent(from.held_out_relative_error, [&](double v) { to.set_held_out_relative_error(v); });
  SetIfPresent(from.held_out_nearest_relative_error,
               [&](double v) { to.set_held_out_nearest_relative_error(v); });
  for (const engine::DampingCandidate& candidate : from.damping_candidates) {
    v1::LadderStep* const entry = to.add_ladder();
    entry->set_lambda(candidate.lambda);
    entry->set_held_out_relative_error(candidate.held_out_relative_error);
    entry->set_scale_trials(candidate.scale_trials);
    entry->set_polish(candidate.polish);
  }
  if (from.polish.has_value()) {
    v1::Polish* const polish = to.mutable_polish();
    polish->set_passes(from.polish->passes);
    polish->set_damped_squared_error_before(from.polish->damped_before);
  }
  if (from.underflow.has_value()) {
    v1::Underflow* const underflow = to.mutable_underflow();
    underflow->set_groups(from.underflow->groups);
    underflow->set_rows(from.underflow->rows);
    underflow->mutable_first_rows()->Add(from.underflow->first_rows.begin(),
                                         from.underflow->first_rows.end());
  }
  const std::vector<v1::Reader> readers = LoadsIn(from.spec);
  to.mutable_loads_in()->Add(readers.begin(), readers.end());
  if (readers.empty()) {
    to.add_warnings(
        "no reader is known to load this format with these bits, zero points, groups and order; "
        "readers.csv, and the clients' help, tell what each reader takes");
  }
  *to.mutable_spec() = ToProto(from.spec);
  to.set_calibration_id(facts.calibration_id);
  to.set_sums_sha256(facts.sums_sha256);
  to.set_held_out_fraction(facts.held_out_fraction);
  to.set_held_out_block_rows(facts.held_out_fraction > 0 ? facts.held_out_block_rows : 0);
  v1::PhaseSeconds* const seconds = to.mutable_phase_seconds();
  seconds->set_receive(facts.receive_seconds);
  seconds->set_queue(facts.queue_seconds);
  seconds->set_factor(from.seconds.factor);
  seconds->set_round(from.seconds.round);
  seconds->set_certify(from.seconds.certify);
  seconds->set_reference(from.seconds.reference);
  seconds->set_pack(from.seconds.pack);
  return to;
}

}  // namespace

std::vector<v1::Certificate> ToProto(const engine::LayerCertificate& certificate,
                                     const CertificateFacts& facts, int64_t rows_per_message) {
  std::vector<v1::Certificate> messages;
  messages.push_back(Summary(certificate, facts));
  if (!certificate.spec.per_row) return messages;
  const size_t rows = certificate.row_error.size();
  const auto step = static_cast<size_t>(rows_per_message);
  for (size_t begin = 0; begin < rows; begin += step) {
    if (begin > 0) messages.emplace_back();
    const size_t end = std::min(rows, begin + step);
    AppendRange(certificate.row_error, begin, end, messages.back().mutable_row_error());
    AppendRange(certificate.row_bound, begin, end, messages.back().mutable_row_bound());
    AppendRange(certificate.row_rounding, begin, end, messages.back().mutable_row_rounding());
  }
  return messages;
}

v1::ResultHeader ToProto(const std::vector<engine::ResultTensor>& tensors) {
  v1::ResultHeader header;
  int64_t bytes = 0;
  for (const engine::ResultTensor& tensor : tensors) {
    v1::TensorHeader* const to = header.add_tensors();
    to->set_name(tensor.role);
    to->set_dtype(ToWire(tensor.dtype, kDataTypes));
    to->mutable_shape()->Add(tensor.shape.begin(), tensor.shape.end());
    bytes += static_cast<int64_t>(tensor.bytes.size());
  }
  header.set_total_bytes(bytes);
  return header;
}

}  // namespace certiq::server
