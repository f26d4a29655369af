#include "verify_layers.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <random>
#include <utility>

#include "engine/gram/held_out_split.h"
#include "tensors.h"
#include "tests/engine/specs.h"

namespace certiq::testing {
namespace {

OwnedTensor Encode(const std::string& name, v1::DataType dtype, int64_t rows, int64_t columns,
                   const std::vector<double>& values) {
  OwnedTensor tensor{name, dtype, {rows, columns}, ""};
  for (const double value : values) {
    const auto single = static_cast<float>(value);
    char bytes[8];
    size_t size = 4;
    if (dtype == v1::DATA_TYPE_F64) {
      size = 8;
      std::memcpy(bytes, &value, size);
    } else if (dtype == v1::DATA_TYPE_F32) {
      std::memcpy(bytes, &single, size);
    } else {
      size = 2;
      const auto type = dtype == v1::DATA_TYPE_F16 ? engine::DType::kF16 : engine::DType::kBF16;
      const uint16_t bits = engine::HalfBits(type, engine::RoundTo(type, single));
      std::memcpy(bytes, &bits, size);
    }
    tensor.data.append(bytes, size);
  }
  return tensor;
}

// Rows of a tensor as float32.
std::vector<float> Floats(const OwnedTensor& tensor) {
  std::vector<float> values(static_cast<size_t>(tensor.shape[0] * tensor.shape[1]));
  verify::DecodeFloats(tensor.View(), 0, static_cast<int64_t>(values.size()), values.data());
  return values;
}

v1::DataType ToProto(engine::DType dtype) { return DataTypeFromName(engine::Name(dtype)); }

// Enumerators of both sides are in the same order.
template <typename To, typename From>
To Enum(From value) {
  return static_cast<To>(static_cast<int>(value) + 1);
}

void FillSpec(const engine::ResolvedSpec& spec, v1::QuantizationSpec* to) {
  to->set_method(Enum<v1::Method>(spec.method));
  to->set_bits(spec.bits);
  to->set_symmetric(spec.symmetric);
  to->set_group_size(static_cast<int32_t>(spec.group_size));
  to->set_scale_dtype(ToProto(spec.scale_dtype));
  to->set_group_scales(Enum<v1::GroupScales>(spec.group_scales));
  to->set_scale(Enum<v1::ScaleRule>(spec.scale));
  if (spec.scale_objective.has_value()) {
    to->set_scale_objective(Enum<v1::ScaleObjective>(*spec.scale_objective));
    to->set_scale_passes(spec.scale_passes);
  }
  to->set_scale_trials(spec.scale_trials);
  to->set_signed_scales(spec.signed_scales);
  to->set_polish(spec.polish);
  to->set_rounding(Enum<v1::Rounding>(spec.rounding));
  to->set_seed(spec.seed);
  to->set_order(Enum<v1::Order>(spec.order));
  to->set_format(Enum<v1::Format>(spec.format));
  v1::Damping* const damping = to->mutable_damping();
  switch (*spec.damping_rule) {
    case engine::DampingRule::kRelativeTrace:
      damping->set_relative_trace(spec.damping_value);
      break;
    case engine::DampingRule::kAbsolute:
      damping->set_absolute(spec.damping_value);
      break;
    case engine::DampingRule::kRelativeSigmaMax:
      damping->set_relative_sigma_max(spec.damping_value);
      break;
    case engine::DampingRule::kHeldOut:
      for (const double step : spec.damping_candidates)
        damping->mutable_held_out()->add_ladder(step);
      damping->mutable_held_out()->set_climb(spec.damping_climb);
      break;
  }
  damping->set_max_attempts(spec.max_attempts);
  damping->set_factor(spec.damping_factor);
  damping->set_on_failure(Enum<v1::OnFailure>(spec.on_failure));
  to->mutable_certificate()->set_per_row(spec.per_row);
  to->mutable_certificate()->set_failure_probability(spec.failure_probability);
  to->mutable_certificate()->set_compare_nearest(spec.compare_nearest);
}

v1::Certificate ToProto(const engine::LayerCertificate& from) {
  v1::Certificate to;
  to.set_schema_version(1);
  to.set_engine_version(engine::EngineVersion());
  to.set_isa(engine::EngineIsa());
  to.set_rows(from.rows);
  to.set_features(from.features);
  to.set_tokens(from.tokens);
  FillSpec(from.spec, to.mutable_spec());
  to.set_method(to.spec().method());
  to.set_bits(to.spec().bits());
  to.set_symmetric(to.spec().symmetric());
  to.set_group_size(to.spec().group_size());
  to.set_seed(to.spec().seed());
  to.set_outcome(Enum<v1::Outcome>(from.outcome));
  for (const std::string& warning : from.warnings) to.add_warnings(warning);
  to.set_bits_per_weight(from.bits_per_weight);
  to.set_lambda_requested(from.lambda_requested);
  to.set_lambda_used(from.lambda_used);
  for (const engine::DampingAttempt& attempt : from.damping_attempts) {
    v1::DampingAttempt* const added = to.add_damping_attempts();
    added->set_lambda(attempt.lambda);
    added->set_cause(Enum<v1::StabilityCause>(attempt.cause));
    added->set_detail(attempt.detail);
  }
  to.set_condition_estimate(from.condition_estimate);
  to.set_squared_error(from.squared_error);
  to.set_damped_squared_error(from.damped_squared_error);
  to.set_reference_energy(from.reference_energy);
  to.set_relative_error(from.relative_error);
  const auto set = [](const auto& value, auto setter) {
    if (value.has_value()) setter(*value);
  };
  set(from.nearest_relative_error, [&](double v) { to.set_nearest_relative_error(v); });
  to.set_l2_bound(from.l2_bound);
  to.set_identity_residual(from.identity_residual);
  to.set_squared_error_rounding(from.squared_error_rounding);
  to.set_reference_energy_rounding(from.reference_energy_rounding);
  to.set_c2(from.c2);
  to.set_c_inf(from.c_inf);
  if (from.spec.per_row) {
    for (const double error : from.row_error) to.add_row_error(error);
    for (const double bound : from.row_bound) to.add_row_bound(bound);
    for (const double rounding : from.row_rounding) to.add_row_rounding(rounding);
  }
  to.set_clipped_weights(from.clipped_weights);
  to.set_clipped_rows(from.clipped_rows);
  to.set_worst_overshoot(from.worst_overshoot);
  set(from.bits_needed, [&](int32_t v) { to.set_bits_needed(v); });
  to.set_dead_features(from.dead_features);
  to.set_held_out_tokens(from.held_out_tokens);
  to.set_held_out_rows(from.held_out_rows);
  set(from.held_out_relative_error, [&](double v) { to.set_held_out_relative_error(v); });
  set(from.held_out_nearest_relative_error,
      [&](double v) { to.set_held_out_nearest_relative_error(v); });
  for (const engine::DampingCandidate& candidate : from.damping_candidates) {
    v1::LadderStep* const added = to.add_ladder();
    added->set_lambda(candidate.lambda);
    added->set_held_out_relative_error(candidate.held_out_relative_error);
    added->set_scale_trials(candidate.scale_trials);
    added->set_polish(candidate.polish);
  }
  set(from.predicted_squared_error, [&](double v) { to.set_predicted_squared_error(v); });
  set(from.rate_gap_bits, [&](double v) { to.set_rate_gap_bits(v); });
  set(from.linf_bound, [&](double v) { to.set_linf_bound(v); });
  set(from.linf_probability, [&](double v) { to.set_linf_probability(v); });
  set(from.qronos_initial, [&](double v) { to.set_qronos_initial(v); });
  set(from.optq_initial, [&](double v) { to.set_optq_initial(v); });
  set(from.floor, [&](double v) { to.set_floor(v); });
  if (from.polish.has_value()) {
    to.mutable_polish()->set_passes(from.polish->passes);
    to.mutable_polish()->set_damped_squared_error_before(from.polish->damped_before);
  }
  if (from.underflow.has_value()) {
    to.mutable_underflow()->set_groups(from.underflow->groups);
    to.mutable_underflow()->set_rows(from.underflow->rows);
    for (const int64_t row : from.underflow->first_rows) {
      to.mutable_underflow()->add_first_rows(row);
    }
  }
  to.mutable_phase_seconds()->set_factor(from.seconds.factor);
  return to;
}

// Sums over the rows that are held out, or those that are not.
engine::Statistics Sums(const VerifiedLayer& layer, const engine::HeldOutSplit& split, bool held) {
  engine::SerialExecutor executor;
  const int64_t n = layer.x.shape[1];
  const std::vector<float> x = Floats(layer.x);
  const std::vector<float> q =
      layer.x_quantized.has_value() ? Floats(*layer.x_quantized) : std::vector<float>();
  engine::StatisticsAccumulator sums(n, layer.x_quantized.has_value());
  for (int64_t t = 0; t < layer.x.shape[0]; ++t) {
    if (split.IsHeldOut(t) != held) continue;
    const auto* row = reinterpret_cast<const std::byte*>(x.data() + t * n);
    const absl::Status status =
        layer.x_quantized.has_value()
            ? sums.AppendPair({engine::DType::kF32, row, "x"},
                              {engine::DType::kF32,
                               reinterpret_cast<const std::byte*>(q.data() + t * n), "x_quantized"},
                              t, 1, executor)
            : sums.Append({engine::DType::kF32, row, "x"}, t, 1, executor);
    if (!status.ok()) std::abort();
  }
  return std::move(sums).Finish(executor);
}

}  // namespace

verify::Sources VerifiedLayer::Sources() const {
  verify::Sources sources;
  sources.weight = weight.View();
  sources.x = x.View();
  if (x_quantized.has_value()) sources.x_quantized = x_quantized->View();
  sources.result = [this](const std::string& role) -> absl::StatusOr<TensorView> {
    for (const OwnedTensor& tensor : result) {
      if (tensor.name == role) return tensor.View();
    }
    return absl::NotFoundError(role);
  };
  return sources;
}

absl::StatusOr<VerifiedLayer> QuantizeRandom(const LayerOptions& options,
                                             const engine::ResolvedSpec& spec) {
  std::mt19937_64 random(options.seed);
  std::normal_distribution<double> gauss;
  const int64_t n = options.features;
  std::vector<double> w(static_cast<size_t>(options.rows * n));
  std::vector<double> x(static_cast<size_t>(options.tokens * n));
  for (double& value : w) value = 0.05 * gauss(random);
  for (const LayerOptions::SmallWeights& small : options.small) {
    for (int64_t j = small.first; j < std::min(n, small.last); ++j) {
      w[static_cast<size_t>(small.row * n + j)] *= small.factor;
    }
  }
  for (size_t i = 0; i < x.size(); ++i) {
    const auto j = static_cast<int64_t>(i) % n;
    x[i] = options.x_scale * gauss(random);
    if (j > 0) x[i] = 0.4 * x[i] + 0.85 * x[i - 1];
  }
  std::vector<double> y = x;
  for (double& value : y) value += 0.2 * options.x_scale * gauss(random);
  for (const int64_t j : options.dead) {
    for (int64_t t = 0; t < options.tokens; ++t) {
      const auto at = static_cast<size_t>(t * n + j);
      if (!options.mismatched) x[at] = 0;
      y[at] = 0;
    }
  }
  VerifiedLayer layer;
  layer.weight = Encode("l.weight", options.weight_dtype, options.rows, n, w);
  layer.x = Encode("l.x", options.x_dtype, options.tokens, n, x);
  if (options.mismatched) layer.x_quantized = Encode("l.xq", options.x_dtype, options.tokens, n, y);

  const engine::ResolvedSpec resolved = Completed(spec);
  const int64_t block =
      engine::HeldOutBlockRows(options.tokens, options.held_out_fraction, options.sequence_rows);
  const engine::HeldOutSplit split(options.held_out_fraction, block, options.stream_id);
  engine::SerialExecutor executor;
  engine::RunContext context;
  context.executor = &executor;
  engine::StripMatrix strips(options.rows, n);
  const std::vector<float> weights = Floats(layer.weight);
  for (int64_t r = 0; r < options.rows; ++r) strips.SetRow(r, weights.data() + r * n);
  engine::LayerProblem problem{resolved, std::move(strips),
                               std::make_shared<engine::Statistics>(Sums(layer, split, false))};
  if (options.held_out_fraction > 0) {
    problem.held_out = std::make_shared<engine::Statistics>(Sums(layer, split, true));
  }
  absl::StatusOr<engine::QuantizedLayer> quantized =
      engine::QuantizeLayer(std::move(problem), context);
  if (!quantized.ok()) return quantized.status();
  for (const engine::ResultTensor& tensor : quantized->tensors) {
    layer.result.push_back(
        {tensor.role, ToProto(tensor.dtype), tensor.shape,
         std::string(reinterpret_cast<const char*>(tensor.bytes.data()), tensor.bytes.size())});
  }
  layer.certificate = ToProto(quantized->certificate);
  v1::Certificate& c = layer.certificate;
  c.set_weights_sha256(verify::Sha256Hex(layer.weight.data));
  c.set_x_sha256(verify::Sha256Hex(layer.x.data));
  if (options.mismatched) c.set_x_quantized_sha256(verify::Sha256Hex(layer.x_quantized->data));
  c.set_held_out_fraction(options.held_out_fraction);
  c.set_held_out_block_rows(options.held_out_fraction > 0 ? block : 0);
  return layer;
}

}  // namespace certiq::testing
