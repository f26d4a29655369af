// The enums of the contract and the engine's, side by side.

#ifndef CERTIQ_CONTRACT_ENUMS_H_
#define CERTIQ_CONTRACT_ENUMS_H_

#include <google/protobuf/generated_enum_reflection.h>

#include <array>
#include <optional>
#include <string>
#include <utility>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/string_view.h"
#include "base/status.h"
#include "certiq/v1/certificate.pb.h"
#include "certiq/v1/job_service.pb.h"
#include "certiq/v1/quantization_service.pb.h"
#include "certiq/v1/spec.pb.h"
#include "certiq/v1/tensor.pb.h"
#include "engine/certificate.h"
#include "engine/kernels/dtype.h"
#include "engine/linalg/udu_factor.h"
#include "engine/run_context.h"
#include "engine/spec.h"

namespace certiq::server {

// The values of an enum on the wire and here. What is not listed is refused.
template <typename Wire, typename Ours, size_t N>
using EnumTable = std::array<std::pair<Wire, Ours>, N>;

inline constexpr EnumTable<v1::Method, engine::Method, 3> kMethods = {{
    {v1::METHOD_NEAREST, engine::Method::kNearest},
    {v1::METHOD_OPTQ, engine::Method::kOptq},
    {v1::METHOD_QRONOS, engine::Method::kQronos},
}};
inline constexpr EnumTable<v1::GroupScales, engine::GroupScales, 2> kGroupScales = {{
    {v1::GROUP_SCALES_STATIC, engine::GroupScales::kStatic},
    {v1::GROUP_SCALES_DYNAMIC, engine::GroupScales::kDynamic},
}};
inline constexpr EnumTable<v1::ScaleRule, engine::ScaleRule, 4> kScaleRules = {{
    {v1::SCALE_RULE_ABSMAX, engine::ScaleRule::kAbsmax},
    {v1::SCALE_RULE_MSE, engine::ScaleRule::kMse},
    {v1::SCALE_RULE_PISO, engine::ScaleRule::kPiso},
    {v1::SCALE_RULE_COMPENSATED, engine::ScaleRule::kCompensated},
}};
inline constexpr EnumTable<v1::ScaleObjective, engine::ScaleObjective, 4> kScaleObjectives = {{
    {v1::SCALE_OBJECTIVE_INPUTS, engine::ScaleObjective::kInputs},
    {v1::SCALE_OBJECTIVE_QUANTIZED_INPUTS, engine::ScaleObjective::kQuantizedInputs},
    {v1::SCALE_OBJECTIVE_MIXED, engine::ScaleObjective::kMixed},
    {v1::SCALE_OBJECTIVE_DATA_FREE, engine::ScaleObjective::kDataFree},
}};
inline constexpr EnumTable<v1::Rounding, engine::Rounding, 2> kRoundings = {{
    {v1::ROUNDING_NEAREST, engine::Rounding::kNearest},
    {v1::ROUNDING_STOCHASTIC, engine::Rounding::kStochastic},
}};
inline constexpr EnumTable<v1::Order, engine::Order, 2> kOrders = {{
    {v1::ORDER_NATURAL, engine::Order::kNatural},
    {v1::ORDER_DECREASING_NORM, engine::Order::kDecreasingNorm},
}};
inline constexpr EnumTable<v1::OnFailure, engine::OnFailure, 2> kOnFailures = {{
    {v1::ON_FAILURE_FAIL, engine::OnFailure::kFail},
    {v1::ON_FAILURE_NEAREST, engine::OnFailure::kNearest},
}};
inline constexpr EnumTable<v1::Format, engine::Format, 6> kFormats = {{
    {v1::FORMAT_DENSE_F32, engine::Format::kDenseF32},
    {v1::FORMAT_DENSE_F16, engine::Format::kDenseF16},
    {v1::FORMAT_DENSE_BF16, engine::Format::kDenseBF16},
    {v1::FORMAT_GPTQ, engine::Format::kGptq},
    {v1::FORMAT_GPTQ_V2, engine::Format::kGptqV2},
    {v1::FORMAT_COMPRESSED_TENSORS, engine::Format::kCompressedTensors},
}};
inline constexpr EnumTable<v1::Quality, engine::Quality, 3> kQualities = {{
    {v1::QUALITY_FAST, engine::Quality::kFast},
    {v1::QUALITY_BALANCED, engine::Quality::kBalanced},
    {v1::QUALITY_BEST, engine::Quality::kBest},
}};
inline constexpr EnumTable<v1::DataType, engine::DType, 7> kDataTypes = {{
    {v1::DATA_TYPE_F64, engine::DType::kF64},
    {v1::DATA_TYPE_F32, engine::DType::kF32},
    {v1::DATA_TYPE_F16, engine::DType::kF16},
    {v1::DATA_TYPE_BF16, engine::DType::kBF16},
    {v1::DATA_TYPE_I64, engine::DType::kI64},
    {v1::DATA_TYPE_I32, engine::DType::kI32},
    {v1::DATA_TYPE_U8, engine::DType::kU8},
}};
inline constexpr EnumTable<v1::StabilityCause, engine::StabilityCause, 4> kCauses = {{
    {v1::STABILITY_CAUSE_NONE, engine::StabilityCause::kNone},
    {v1::STABILITY_CAUSE_PIVOT, engine::StabilityCause::kPivot},
    {v1::STABILITY_CAUSE_NON_FINITE, engine::StabilityCause::kNonFinite},
    {v1::STABILITY_CAUSE_CONDITION, engine::StabilityCause::kCondition},
}};
inline constexpr EnumTable<v1::Outcome, engine::Outcome, 2> kOutcomes = {{
    {v1::OUTCOME_QUANTIZED, engine::Outcome::kQuantized},
    {v1::OUTCOME_FELL_BACK_TO_NEAREST, engine::Outcome::kFellBackToNearest},
}};
inline constexpr EnumTable<v1::Phase, engine::Phase, 7> kPhases = {{
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

// INVALID_ARGUMENT naming the field and what is in the table.
template <typename Wire, typename Ours, size_t N>
absl::StatusOr<Ours> FromWire(Wire value, const EnumTable<Wire, Ours, N>& table,
                              absl::string_view field) {
  std::string expected;
  for (const auto& [wire, ours] : table) {
    if (wire == value) return ours;
    absl::StrAppend(&expected, expected.empty() ? "" : ", ", NameOf(wire));
  }
  return base::InvalidField(field,
                            absl::StrCat("expected one of ", expected, "; got ", NameOf(value)));
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

}  // namespace certiq::server

#endif  // CERTIQ_CONTRACT_ENUMS_H_
