#include "rpc/convert.h"

#include <google/protobuf/generated_enum_reflection.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <optional>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/strings/string_view.h"
#include "engine/status.h"

namespace certiq::rpc {
namespace {

using engine::FieldError;
using engine::InvalidField;

constexpr size_t kMaxRequestIdBytes = 128;
constexpr size_t kMaxNameBytes = 256;
// Held out where the damping rule needs tokens and the header says nothing.
constexpr double kDefaultHeldOut = 0.125;

// The values of an enum on the wire and here. What is not listed is refused.
template <typename Wire, typename Ours, size_t N>
using EnumTable = std::array<std::pair<Wire, Ours>, N>;

constexpr EnumTable<v1::Method, engine::Method, 3> kMethods = {{
    {v1::METHOD_NEAREST, engine::Method::kNearest},
    {v1::METHOD_OPTQ, engine::Method::kOptq},
    {v1::METHOD_QRONOS, engine::Method::kQronos},
}};
constexpr EnumTable<v1::GroupScales, engine::GroupScales, 2> kGroupScales = {{
    {v1::GROUP_SCALES_STATIC, engine::GroupScales::kStatic},
    {v1::GROUP_SCALES_DYNAMIC, engine::GroupScales::kDynamic},
}};
constexpr EnumTable<v1::ScaleRule, engine::ScaleRule, 4> kScaleRules = {{
    {v1::SCALE_RULE_ABSMAX, engine::ScaleRule::kAbsmax},
    {v1::SCALE_RULE_MSE, engine::ScaleRule::kMse},
    {v1::SCALE_RULE_PISO, engine::ScaleRule::kPiso},
    {v1::SCALE_RULE_COMPENSATED, engine::ScaleRule::kCompensated},
}};
constexpr EnumTable<v1::Rounding, engine::Rounding, 2> kRoundings = {{
    {v1::ROUNDING_NEAREST, engine::Rounding::kNearest},
    {v1::ROUNDING_STOCHASTIC, engine::Rounding::kStochastic},
}};
constexpr EnumTable<v1::Order, engine::Order, 2> kOrders = {{
    {v1::ORDER_NATURAL, engine::Order::kNatural},
    {v1::ORDER_DECREASING_NORM, engine::Order::kDecreasingNorm},
}};
constexpr EnumTable<v1::OnFailure, engine::OnFailure, 2> kOnFailures = {{
    {v1::ON_FAILURE_FAIL, engine::OnFailure::kFail},
    {v1::ON_FAILURE_NEAREST, engine::OnFailure::kNearest},
}};
constexpr EnumTable<v1::Format, engine::Format, 6> kFormats = {{
    {v1::FORMAT_DENSE_F32, engine::Format::kDenseF32},
    {v1::FORMAT_DENSE_F16, engine::Format::kDenseF16},
    {v1::FORMAT_DENSE_BF16, engine::Format::kDenseBF16},
    {v1::FORMAT_GPTQ, engine::Format::kGptq},
    {v1::FORMAT_GPTQ_V2, engine::Format::kGptqV2},
    {v1::FORMAT_COMPRESSED_TENSORS, engine::Format::kCompressedTensors},
}};
constexpr EnumTable<v1::Quality, engine::Quality, 3> kQualities = {{
    {v1::QUALITY_FAST, engine::Quality::kFast},
    {v1::QUALITY_BALANCED, engine::Quality::kBalanced},
    {v1::QUALITY_BEST, engine::Quality::kBest},
}};
constexpr EnumTable<v1::DataType, engine::DType, 7> kDataTypes = {{
    {v1::DATA_TYPE_F64, engine::DType::kF64},
    {v1::DATA_TYPE_F32, engine::DType::kF32},
    {v1::DATA_TYPE_F16, engine::DType::kF16},
    {v1::DATA_TYPE_BF16, engine::DType::kBF16},
    {v1::DATA_TYPE_I64, engine::DType::kI64},
    {v1::DATA_TYPE_I32, engine::DType::kI32},
    {v1::DATA_TYPE_U8, engine::DType::kU8},
}};
constexpr EnumTable<v1::StabilityCause, engine::StabilityCause, 4> kCauses = {{
    {v1::STABILITY_CAUSE_NONE, engine::StabilityCause::kNone},
    {v1::STABILITY_CAUSE_PIVOT, engine::StabilityCause::kPivot},
    {v1::STABILITY_CAUSE_NON_FINITE, engine::StabilityCause::kNonFinite},
    {v1::STABILITY_CAUSE_CONDITION, engine::StabilityCause::kCondition},
}};
constexpr EnumTable<v1::Outcome, engine::Outcome, 2> kOutcomes = {{
    {v1::OUTCOME_QUANTIZED, engine::Outcome::kQuantized},
    {v1::OUTCOME_FELL_BACK_TO_NEAREST, engine::Outcome::kFellBackToNearest},
}};
constexpr EnumTable<v1::Phase, engine::Phase, 7> kPhases = {{
    {v1::PHASE_RECEIVE, engine::Phase::kReceive},
    {v1::PHASE_QUEUE, engine::Phase::kQueue},
    {v1::PHASE_FACTOR, engine::Phase::kFactor},
    {v1::PHASE_ROUND, engine::Phase::kRound},
    {v1::PHASE_CERTIFY, engine::Phase::kCertify},
    {v1::PHASE_REFERENCE, engine::Phase::kReference},
    {v1::PHASE_PACK, engine::Phase::kPack},
}};

template <typename Wire>
std::string NameOf(Wire value) {
  const auto* const known =
      google::protobuf::GetEnumDescriptor<Wire>()->FindValueByNumber(static_cast<int>(value));
  return known != nullptr ? std::string(known->name())
                          : absl::StrCat("the unknown number ", static_cast<int>(value));
}

template <typename Wire, typename Ours, size_t N>
absl::StatusOr<Ours> FromWire(Wire value, const EnumTable<Wire, Ours, N>& table,
                              absl::string_view field) {
  std::string expected;
  for (const auto& [wire, ours] : table) {
    if (wire == value) return ours;
    absl::StrAppend(&expected, expected.empty() ? "" : ", ", NameOf(wire));
  }
  return InvalidField(field, absl::StrCat("expected one of ", expected, "; got ", NameOf(value)));
}

template <typename Wire, typename Ours, size_t N>
Wire ToWire(Ours value, const EnumTable<Wire, Ours, N>& table) {
  for (const auto& [wire, ours] : table) {
    if (ours == value) return wire;
  }
  return static_cast<Wire>(0);
}

// Converts a field with presence: absent stays absent.
template <typename Wire, typename Ours, size_t N>
absl::Status ReadEnum(bool has, Wire value, const EnumTable<Wire, Ours, N>& table,
                      absl::string_view field, std::optional<Ours>& out) {
  if (!has) return absl::OkStatus();
  absl::StatusOr<Ours> converted = FromWire(value, table, field);
  if (converted.ok()) out = *converted;
  return converted.status();
}

// The first that is not OK.
absl::Status First(std::initializer_list<absl::Status> statuses) {
  for (const absl::Status& status : statuses) {
    if (!status.ok()) return status;
  }
  return absl::OkStatus();
}

absl::Status ReadDamping(const v1::Damping& damping, engine::QuantizationSpec& out) {
  switch (damping.rule_case()) {
    case v1::Damping::kRelativeTrace:
      out.damping_rule = engine::DampingRule::kRelativeTrace;
      out.damping_value = damping.relative_trace();
      break;
    case v1::Damping::kAbsolute:
      out.damping_rule = engine::DampingRule::kAbsolute;
      out.damping_value = damping.absolute();
      break;
    case v1::Damping::kRelativeSigmaMax:
      out.damping_rule = engine::DampingRule::kRelativeSigmaMax;
      out.damping_value = damping.relative_sigma_max();
      break;
    case v1::Damping::kHeldOut:
      out.damping_rule = engine::DampingRule::kHeldOut;
      out.damping_ladder.assign(damping.held_out().ladder().begin(),
                                damping.held_out().ladder().end());
      break;
    case v1::Damping::RULE_NOT_SET:
      break;
  }
  if (damping.has_max_attempts()) out.max_attempts = damping.max_attempts();
  if (damping.has_factor()) out.damping_factor = damping.factor();
  return ReadEnum(damping.has_on_failure(), damping.on_failure(), kOnFailures,
                  "spec.damping.on_failure", out.on_failure);
}

void ReadGrid(const v1::ExplicitGrid& grid, engine::QuantizationSpec& out) {
  engine::ExplicitGrid& to = out.grid.emplace();
  to.scales.assign(grid.scales().begin(), grid.scales().end());
  to.zero_points.assign(grid.zero_points().begin(), grid.zero_points().end());
  if (grid.has_lowest_code()) to.lowest_code = grid.lowest_code();
  if (grid.has_highest_code()) to.highest_code = grid.highest_code();
}

absl::Status CheckName(absl::string_view field, absl::string_view value, size_t limit) {
  if (value.size() <= limit) return absl::OkStatus();
  return InvalidField(
      field, absl::StrCat("expected at most ", limit, " bytes, got ", value.size(), " bytes"));
}

// What a matrix header announces.
struct MatrixShape {
  int64_t rows = 0;
  int64_t columns = 0;
  engine::DType dtype = engine::DType::kF32;
};

absl::StatusOr<MatrixShape> ReadMatrix(bool has, const v1::TensorHeader& header,
                                       absl::string_view field, absl::string_view dimensions) {
  if (!has) return InvalidField(field, "expected a tensor header, got none");
  if (absl::Status name = CheckName(absl::StrCat(field, ".name"), header.name(), kMaxNameBytes);
      !name.ok()) {
    return name;
  }
  const absl::StatusOr<engine::DType> dtype =
      FromWire(header.dtype(), kDataTypes, absl::StrCat(field, ".dtype"));
  if (!dtype.ok()) return dtype.status();
  if (header.shape_size() != 2) {
    return InvalidField(
        absl::StrCat(field, ".shape"),
        absl::StrCat("expected two dimensions, ", dimensions, ", got ", header.shape_size()));
  }
  return MatrixShape{header.shape(0), header.shape(1), *dtype};
}

// What the contract has and this server does not offer yet, other than in the spec
// (engine::ResolveSpec answers for that).
absl::Status CheckOffered(const v1::QuantizeHeader& header) {
  const auto not_yet = [](absl::string_view field, absl::string_view what) {
    return FieldError(
        absl::StatusCode::kUnimplemented, field,
        absl::StrCat(what, " is part of the contract but this server does not offer it yet"));
  };
  if (!header.calibration_id().empty()) return not_yet("calibration_id", "a stored calibration");
  return absl::OkStatus();
}

// Appends [begin, end) of `from` to a repeated field.
void AppendRange(const std::vector<double>& from, size_t begin, size_t end,
                 google::protobuf::RepeatedField<double>* to) {
  to->Add(from.begin() + static_cast<std::ptrdiff_t>(begin),
          from.begin() + static_cast<std::ptrdiff_t>(end));
}

template <typename T, typename Setter>
void SetIfPresent(const std::optional<T>& value, Setter set) {
  if (value.has_value()) set(*value);
}

// The settings as decided; an explicit grid stays out.
v1::QuantizationSpec ToProto(const engine::ResolvedSpec& from) {
  v1::QuantizationSpec to;
  to.set_method(ToWire(from.method, kMethods));
  to.set_bits(from.bits);
  to.set_symmetric(from.symmetric);
  to.set_group_size(static_cast<int32_t>(from.group_size));
  to.set_scale_dtype(ToWire(from.scale_dtype, kDataTypes));
  to.set_group_scales(ToWire(from.group_scales, kGroupScales));
  to.set_scale(ToWire(from.scale, kScaleRules));
  to.set_rounding(ToWire(from.rounding, kRoundings));
  to.set_seed(from.seed);
  to.set_order(ToWire(from.order, kOrders));
  to.set_format(ToWire(from.format, kFormats));
  v1::Damping* const damping = to.mutable_damping();
  switch (from.damping_rule.value_or(engine::DampingRule::kRelativeTrace)) {
    case engine::DampingRule::kRelativeTrace:
      damping->set_relative_trace(from.damping_value);
      break;
    case engine::DampingRule::kAbsolute:
      damping->set_absolute(from.damping_value);
      break;
    case engine::DampingRule::kRelativeSigmaMax:
      damping->set_relative_sigma_max(from.damping_value);
      break;
    case engine::DampingRule::kHeldOut:
      damping->mutable_held_out()->mutable_ladder()->Add(from.damping_ladder.begin(),
                                                         from.damping_ladder.end());
      break;
  }
  damping->set_max_attempts(from.max_attempts);
  damping->set_factor(from.damping_factor);
  damping->set_on_failure(ToWire(from.on_failure, kOnFailures));
  to.mutable_certificate()->set_per_row(from.per_row);
  to.mutable_certificate()->set_failure_probability(from.failure_probability);
  to.mutable_certificate()->set_compare_nearest(from.compare_nearest);
  return to;
}

// Everything but the rows.
v1::Certificate Summary(const engine::LayerCertificate& from, const CallFacts& facts) {
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
  SetIfPresent(from.held_out_relative_error, [&](double v) { to.set_held_out_relative_error(v); });
  for (const engine::LadderStep& step : from.ladder) {
    v1::LadderStep* const entry = to.add_ladder();
    entry->set_lambda(step.lambda);
    entry->set_held_out_relative_error(step.held_out_relative_error);
  }
  *to.mutable_spec() = ToProto(from.spec);
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

absl::StatusOr<engine::QuantizationSpec> FromProto(const v1::QuantizationSpec& spec) {
  engine::QuantizationSpec out;
  absl::Status status = First({
      ReadEnum(spec.has_method(), spec.method(), kMethods, "spec.method", out.method),
      ReadEnum(spec.has_scale_dtype(), spec.scale_dtype(), kDataTypes, "spec.scale_dtype",
               out.scale_dtype),
      ReadEnum(spec.has_group_scales(), spec.group_scales(), kGroupScales, "spec.group_scales",
               out.group_scales),
      ReadEnum(spec.has_scale(), spec.scale(), kScaleRules, "spec.scale", out.scale),
      ReadEnum(spec.has_rounding(), spec.rounding(), kRoundings, "spec.rounding", out.rounding),
      ReadEnum(spec.has_order(), spec.order(), kOrders, "spec.order", out.order),
      ReadEnum(spec.has_format(), spec.format(), kFormats, "spec.format", out.format),
      ReadEnum(spec.has_quality(), spec.quality(), kQualities, "spec.quality", out.quality),
      spec.has_damping() ? ReadDamping(spec.damping(), out) : absl::OkStatus(),
  });
  if (!status.ok()) return status;
  if (spec.has_bits()) out.bits = spec.bits();
  if (spec.has_symmetric()) out.symmetric = spec.symmetric();
  if (spec.has_group_size()) out.group_size = spec.group_size();
  if (spec.has_grid()) ReadGrid(spec.grid(), out);
  if (spec.has_scale_trials()) out.scale_trials = spec.scale_trials();
  if (spec.has_polish()) out.polish = spec.polish();
  if (spec.has_seed()) out.seed = spec.seed();
  const v1::CertificateOptions& certificate = spec.certificate();
  if (certificate.has_per_row()) out.per_row = certificate.per_row();
  if (certificate.has_failure_probability()) {
    out.failure_probability = certificate.failure_probability();
  }
  if (certificate.has_compare_nearest()) out.compare_nearest = certificate.compare_nearest();
  return out;
}

absl::StatusOr<QuantizeCall> FromProto(const v1::QuantizeHeader& header) {
  absl::Status names = First({CheckName("request_id", header.request_id(), kMaxRequestIdBytes),
                              CheckName("layer_name", header.layer_name(), kMaxNameBytes)});
  if (!names.ok()) return names;
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

  const absl::StatusOr<engine::QuantizationSpec> spec = FromProto(header.spec());
  if (!spec.ok()) return spec.status();
  absl::StatusOr<engine::ResolvedSpec> resolved = engine::ResolveSpec(*spec);
  if (!resolved.ok()) return resolved.status();

  const absl::StatusOr<MatrixShape> weight = ReadMatrix(
      header.has_weight(), header.weight(), "weight", "[output channels, input features]");
  if (!weight.ok()) return weight.status();
  if (absl::Status offered = CheckOffered(header); !offered.ok()) return offered;
  const absl::StatusOr<MatrixShape> x =
      ReadMatrix(header.has_x(), header.x(), "x", "[tokens, input features]");
  if (!x.ok()) return x.status();

  QuantizeCall call;
  call.request_id = header.request_id();
  call.layer_name = header.layer_name();
  call.layer.spec = *std::move(resolved);
  call.layer.rows = weight->rows;
  call.layer.features = weight->columns;
  call.layer.weight_dtype = weight->dtype;
  call.layer.tokens = x->rows;
  call.layer.x_features = x->columns;
  call.layer.x_dtype = x->dtype;
  if (header.has_x_quantized()) {
    const absl::StatusOr<MatrixShape> x_quantized =
        ReadMatrix(true, header.x_quantized(), "x_quantized", "[tokens, input features]");
    if (!x_quantized.ok()) return x_quantized.status();
    call.layer.x_quantized_dtype = x_quantized->dtype;
    call.layer.x_quantized_tokens = x_quantized->rows;
    call.layer.x_quantized_features = x_quantized->columns;
  }
  if (header.has_held_out_fraction()) {
    call.layer.held_out_fraction = header.held_out_fraction();
  } else if (call.layer.spec.NeedsHeldOut()) {
    call.layer.held_out_fraction = kDefaultHeldOut;
  }
  call.layer.sequence_rows = header.sequence_rows();
  return call;
}

v1::Phase ToProto(engine::Phase phase) { return ToWire(phase, kPhases); }
v1::DataType ToProto(engine::DType dtype) { return ToWire(dtype, kDataTypes); }

std::vector<v1::Certificate> ToProto(const engine::LayerCertificate& certificate,
                                     const CallFacts& facts, int64_t rows_per_message) {
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
  }
  return messages;
}

v1::ResultHeader ToProto(const std::vector<engine::ResultTensor>& tensors) {
  v1::ResultHeader header;
  int64_t bytes = 0;
  for (const engine::ResultTensor& tensor : tensors) {
    v1::TensorHeader* const to = header.add_tensors();
    to->set_name(tensor.role);
    to->set_dtype(ToProto(tensor.dtype));
    to->mutable_shape()->Add(tensor.shape.begin(), tensor.shape.end());
    bytes += static_cast<int64_t>(tensor.bytes.size());
  }
  header.set_total_bytes(bytes);
  return header;
}

}  // namespace certiq::rpc
