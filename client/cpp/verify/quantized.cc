#include "quantized.h"

#include <algorithm>
#include <cmath>
#include <string>
#include <utility>

#include "absl/status/status.h"
#include "absl/strings/str_cat.h"
#include "base/status_macros.h"
#include "tensors.h"

namespace certiq::verify {
namespace {

using Words = std::vector<uint32_t>;

// Element `index` of a stream of `bits`-bit numbers, least significant bit first; `word(w)` gives
// the stream's 32-bit words.
template <typename WordAt>
int32_t Unpack(int64_t index, int32_t bits, const WordAt& word) {
  uint32_t value = 0;
  for (int32_t b = 0; b < bits; ++b) {
    const int64_t at = index * bits + b;
    value |= (word(at / 32) >> (at % 32) & 1u) << b;
  }
  return static_cast<int32_t>(value);
}

int64_t WordsFor(int64_t count, int32_t bits) { return (count * bits + 31) / 32; }

class Reader {
 public:
  Reader(const v1::QuantizationSpec& spec, const TensorByRole& tensor, Quantized& q)
      : spec_(spec), tensor_(tensor), q_(q) {}

  absl::Status Dense();
  absl::Status Gptq();
  absl::Status Compressed();

 private:
  absl::StatusOr<TensorView> Get(const std::string& role, v1::DataType dtype,
                                 const std::vector<int64_t>& shape);
  absl::StatusOr<Words> GetWords(const std::string& role, const std::vector<int64_t>& shape);
  absl::Status Groups(const std::string& role);
  absl::Status Scales(const std::string& role, v1::DataType dtype, bool groups_first);
  absl::Status CodesFromLevels(const TensorView& weight);

  const v1::QuantizationSpec& spec_;
  const TensorByRole& tensor_;
  Quantized& q_;
};

absl::StatusOr<TensorView> Reader::Get(const std::string& role, v1::DataType dtype,
                                       const std::vector<int64_t>& shape) {
  ASSIGN_OR_RETURN(TensorView tensor, tensor_(role));
  RETURN_IF_ERROR(ExpectTensor(tensor, dtype, shape));
  return tensor;
}

absl::StatusOr<Words> Reader::GetWords(const std::string& role, const std::vector<int64_t>& shape) {
  ASSIGN_OR_RETURN(const TensorView tensor, Get(role, v1::DATA_TYPE_I32, shape));
  ASSIGN_OR_RETURN(const std::vector<int64_t> values, DecodeIntegers(tensor));
  Words words(values.size());
  std::transform(values.begin(), values.end(), words.begin(),
                 [](int64_t value) { return static_cast<uint32_t>(value); });
  return words;
}

absl::Status Reader::Groups(const std::string& role) {
  ASSIGN_OR_RETURN(const TensorView tensor, Get(role, v1::DATA_TYPE_I32, {q_.features}));
  ASSIGN_OR_RETURN(const std::vector<int64_t> values, DecodeIntegers(tensor));
  for (size_t j = 0; j < values.size(); ++j) {
    const int64_t group = values[j];
    if (group < 0 || group >= q_.groups) {
      return absl::InvalidArgumentError(absl::StrCat(tensor.name, ": expected groups 0 to ",
                                                     q_.groups - 1, ", got ", group, " at feature ",
                                                     j));
    }
    q_.group_of[j] = static_cast<int32_t>(group);
  }
  return absl::OkStatus();
}

absl::Status Reader::Scales(const std::string& role, v1::DataType dtype, bool groups_first) {
  const std::vector<int64_t> shape = groups_first ? std::vector<int64_t>{q_.groups, q_.rows}
                                                  : std::vector<int64_t>{q_.rows, q_.groups};
  ASSIGN_OR_RETURN(const TensorView tensor, Get(role, dtype, shape));
  std::vector<float> values(q_.scale.size());
  DecodeFloats(tensor, 0, static_cast<int64_t>(values.size()), values.data());
  for (int64_t r = 0; r < q_.rows; ++r) {
    for (int64_t g = 0; g < q_.groups; ++g) {
      const float scale =
          values[static_cast<size_t>(groups_first ? g * q_.rows + r : r * q_.groups + g)];
      const bool sign = scale > 0 || (scale < 0 && spec_.signed_scales());
      if (!sign || !std::isfinite(scale) || RoundToType(spec_.scale_dtype(), scale) != scale) {
        return absl::InvalidArgumentError(
            absl::StrCat(tensor.name, ": the scale of row ", r, ", group ", g, " is ", scale,
                         ", expected a ", spec_.signed_scales() ? "finite " : "positive finite ",
                         DataTypeName(spec_.scale_dtype())));
      }
      q_.scale[static_cast<size_t>(r * q_.groups + g)] = scale;
    }
  }
  return absl::OkStatus();
}

// Codes of dense weights: the level they stand for is exactly the weight.
absl::Status Reader::CodesFromLevels(const TensorView& weight) {
  std::vector<float> row(static_cast<size_t>(q_.features));
  for (int64_t r = 0; r < q_.rows; ++r) {
    DecodeFloats(weight, r * q_.features, q_.features, row.data());
    for (int64_t j = 0; j < q_.features; ++j) {
      const float value = row[static_cast<size_t>(j)];
      int32_t code = -1;
      if (std::isfinite(value)) {
        const double near =
            std::nearbyint(static_cast<double>(value) / q_.Step(r, j)) + q_.zero[q_.Cell(r, j)];
        // Rounded levels may have left their own cell by one.
        for (const double candidate : {near, near - 1, near + 1}) {
          if (!(candidate >= 0 && candidate <= q_.top)) continue;
          if (q_.Level(r, j, static_cast<int32_t>(candidate)) == value) {
            code = static_cast<int32_t>(candidate);
            break;
          }
        }
      }
      if (code < 0) {
        return absl::InvalidArgumentError(
            absl::StrCat(weight.name, ": row ", r, ", feature ", j, " is ", value,
                         ", which is none of the ", q_.top + 1, " levels of its grid (scale ",
                         q_.Step(r, j), ", zero point ", q_.zero[q_.Cell(r, j)], ")"));
      }
      q_.codes[static_cast<size_t>(r * q_.features + j)] = code;
    }
  }
  return absl::OkStatus();
}

absl::Status Reader::Dense() {
  RETURN_IF_ERROR(Scales("scales", v1::DATA_TYPE_F32, false));
  if (!spec_.symmetric()) {
    ASSIGN_OR_RETURN(const auto zeros, Get("zeros", v1::DATA_TYPE_I32, {q_.rows, q_.groups}));
    ASSIGN_OR_RETURN(const auto values, DecodeIntegers(zeros));
    for (size_t at = 0; at < values.size(); ++at) {
      const int64_t zero = values[at];
      if (zero < 0 || zero > q_.top) {
        return absl::InvalidArgumentError(
            absl::StrCat(zeros.name, ": expected 0 to ", q_.top, ", got ", zero, " at ", at));
      }
      q_.zero[at] = static_cast<int32_t>(zero);
    }
  }
  if (spec_.group_size() != 0) {
    RETURN_IF_ERROR(Groups("g_idx"));
  }
  ASSIGN_OR_RETURN(const auto weight, Get("weight", q_.level_type, {q_.rows, q_.features}));
  return CodesFromLevels(weight);
}

absl::Status Reader::Gptq() {
  const int32_t bits = spec_.bits();
  const int64_t words = WordsFor(q_.features, bits);
  const int64_t zero_words = WordsFor(q_.rows, bits);
  // Version 1 stores zero points minus one.
  const int32_t offset = spec_.format() == v1::FORMAT_GPTQ ? 1 : 0;
  ASSIGN_OR_RETURN(const auto codes, GetWords("qweight", {words, q_.rows}));
  ASSIGN_OR_RETURN(const auto zeros, GetWords("qzeros", {q_.groups, zero_words}));
  RETURN_IF_ERROR(Scales("scales", v1::DATA_TYPE_F16, true));
  RETURN_IF_ERROR(Groups("g_idx"));
  for (int64_t r = 0; r < q_.rows; ++r) {
    for (int64_t g = 0; g < q_.groups; ++g) {
      q_.zero[static_cast<size_t>(r * q_.groups + g)] =
          offset + Unpack(r, bits, [&](int64_t w) {
            return zeros[static_cast<size_t>(g * zero_words + w)];
          });
    }
    for (int64_t j = 0; j < q_.features; ++j) {
      q_.codes[static_cast<size_t>(r * q_.features + j)] =
          Unpack(j, bits, [&](int64_t w) { return codes[static_cast<size_t>(w * q_.rows + r)]; });
    }
  }
  return absl::OkStatus();
}

absl::Status Reader::Compressed() {
  const int32_t bits = spec_.bits();
  const int64_t words = WordsFor(q_.features, bits);
  ASSIGN_OR_RETURN(const auto codes, GetWords("weight_packed", {q_.rows, words}));
  RETURN_IF_ERROR(Scales("weight_scale", spec_.scale_dtype(), false));
  ASSIGN_OR_RETURN(const auto shape, Get("weight_shape", v1::DATA_TYPE_I64, {2}));
  ASSIGN_OR_RETURN(const auto sizes, DecodeIntegers(shape));
  if (sizes != std::vector<int64_t>{q_.rows, q_.features}) {
    return absl::InvalidArgumentError(absl::StrCat(
        shape.name, ": expected ", ShapeText({q_.rows, q_.features}), ", got ", ShapeText(sizes)));
  }
  if (!spec_.symmetric()) {
    const int64_t zero_words = WordsFor(q_.rows, bits);
    ASSIGN_OR_RETURN(const auto zeros, GetWords("weight_zero_point", {zero_words, q_.groups}));
    for (int64_t r = 0; r < q_.rows; ++r) {
      for (int64_t g = 0; g < q_.groups; ++g) {
        q_.zero[static_cast<size_t>(r * q_.groups + g)] = Unpack(
            r, bits, [&](int64_t w) { return zeros[static_cast<size_t>(w * q_.groups + g)]; });
      }
    }
  }
  // Groups that follow the order of work.
  if (spec_.group_size() != 0 && spec_.order() == v1::ORDER_DECREASING_NORM &&
      spec_.group_scales() == v1::GROUP_SCALES_DYNAMIC) {
    RETURN_IF_ERROR(Groups("weight_g_idx"));
  }
  for (int64_t r = 0; r < q_.rows; ++r) {
    for (int64_t j = 0; j < q_.features; ++j) {
      q_.codes[static_cast<size_t>(r * q_.features + j)] =
          Unpack(j, bits, [&](int64_t w) { return codes[static_cast<size_t>(r * words + w)]; });
    }
  }
  return absl::OkStatus();
}

// Grids of negative scales, mirrored.
void TurnOver(Quantized& q) {
  for (int64_t r = 0; r < q.rows; ++r) {
    for (int64_t j = 0; j < q.features; ++j) {
      if (q.scale[q.Cell(r, j)] > 0) continue;
      int32_t& code = q.codes[static_cast<size_t>(r * q.features + j)];
      code = q.top - code;
    }
  }
  for (size_t at = 0; at < q.scale.size(); ++at) {
    if (q.scale[at] > 0) continue;
    q.scale[at] = -q.scale[at];
    q.zero[at] = q.top - q.zero[at];
  }
}

// Finds the groups that stand for zeros because nothing else could be told of them.
void FindVanished(const v1::QuantizationSpec& spec, Quantized& q) {
  const float least = spec.scale_dtype() == v1::DATA_TYPE_F16 ? 0x1p-14f : 0x1p-126f;
  const int32_t middle = 1 << (spec.bits() - 1);
  for (size_t at = 0; at < q.scale.size(); ++at) {
    q.vanishes[at] = q.scale[at] == least && q.zero[at] == middle ? 1 : 0;
  }
  for (int64_t r = 0; r < q.rows; ++r) {
    for (int64_t j = 0; j < q.features; ++j) {
      if (q.Code(r, j) != middle) q.vanishes[q.Cell(r, j)] = 0;
    }
  }
}

}  // namespace

float Quantized::Level(int64_t row, int64_t feature, int32_t code) const {
  const size_t cell = Cell(row, feature);
  return RoundToType(level_type, scale[cell] * static_cast<float>(code - zero[cell]));
}

int32_t Quantized::NearestCode(int64_t row, int64_t feature, float value, int32_t low,
                               int32_t high) const {
  const double free =
      std::nearbyint(static_cast<double>(value) / Step(row, feature)) + zero[Cell(row, feature)];
  const auto even =
      static_cast<int32_t>(std::clamp(free, static_cast<double>(low), static_cast<double>(high)));
  if (level_type == v1::DATA_TYPE_F32) return even;
  int32_t best = even;
  for (const int32_t candidate : {even - 1, even + 1}) {
    if (candidate < low || candidate > high) continue;
    if (std::abs(value - Level(row, feature, candidate)) <
        std::abs(value - Level(row, feature, best))) {
      best = candidate;
    }
  }
  return best;
}

absl::StatusOr<Quantized> ReadQuantized(const v1::QuantizationSpec& spec, int64_t rows,
                                        int64_t features, const TensorByRole& tensor) {
  if (spec.bits() < 2 || spec.bits() > 8 || spec.group_size() < 0) {
    return absl::InvalidArgumentError(
        absl::StrCat("spec: expected 2 to 8 bits and no negative group_size, got ", spec.bits(),
                     " and ", spec.group_size()));
  }
  Quantized q;
  q.rows = rows;
  q.features = features;
  q.groups = spec.group_size() == 0 ? 1 : (features - 1) / spec.group_size() + 1;
  q.top = (1 << spec.bits()) - 1;
  q.group_of.resize(static_cast<size_t>(features));
  for (int64_t j = 0; j < features; ++j) {
    q.group_of[static_cast<size_t>(j)] =
        static_cast<int32_t>(spec.group_size() == 0 ? 0 : j / spec.group_size());
  }
  q.scale.assign(static_cast<size_t>(rows * q.groups), 1);
  q.zero.assign(q.scale.size(), 1 << (spec.bits() - 1));
  q.vanishes.resize(q.scale.size());
  q.codes.resize(static_cast<size_t>(rows * features));

  Reader reader(spec, tensor, q);
  absl::Status status;
  switch (spec.format()) {
    case v1::FORMAT_DENSE_F32:
    case v1::FORMAT_DENSE_F16:
    case v1::FORMAT_DENSE_BF16:
      if (spec.format() == v1::FORMAT_DENSE_F16) q.level_type = v1::DATA_TYPE_F16;
      if (spec.format() == v1::FORMAT_DENSE_BF16) q.level_type = v1::DATA_TYPE_BF16;
      status = reader.Dense();
      break;
    case v1::FORMAT_GPTQ:
    case v1::FORMAT_GPTQ_V2:
      status = reader.Gptq();
      break;
    case v1::FORMAT_COMPRESSED_TENSORS:
      status = reader.Compressed();
      break;
    default:
      status =
          absl::InvalidArgumentError("spec.format: the report names no format this version knows");
  }
  RETURN_IF_ERROR(status);
  for (size_t at = 0; at < q.zero.size(); ++at) {
    if (!spec.symmetric() || q.zero[at] == 1 << (spec.bits() - 1)) continue;
    return absl::InvalidArgumentError(absl::StrCat("zero points: expected ", 1 << (spec.bits() - 1),
                                                   " throughout a symmetric grid, got ", q.zero[at],
                                                   " at ", at));
  }
  TurnOver(q);
  FindVanished(spec, q);
  q.levels.resize(rows, features);
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t j = 0; j < features; ++j) {
      q.levels(r, j) = static_cast<double>(q.Level(r, j, q.Code(r, j)));
    }
  }
  return q;
}

}  // namespace certiq::verify
