// The result of a quantization, unpacked: codes, grid and levels.
#ifndef CERTIQ_CLIENT_CPP_VERIFY_QUANTIZED_H_
#define CERTIQ_CLIENT_CPP_VERIFY_QUANTIZED_H_

#include <cstdint>
#include <vector>

#include "absl/status/statusor.h"
#include "certiq/v1/spec.pb.h"
#include "matrix.h"
#include "sources.h"

namespace certiq::verify {

// Code u of row r at feature j stands for the level scale[r, g] (u - zero[r, g]), g = group_of[j],
// computed in float32 and rounded to level_type. Features are in their original order. A negative
// scale of a symmetric grid is read as the mirrored grid that it stands for: the scale's magnitude,
// zero 2^(b-1) - 1 and code 2^b - 1 - u.
struct Quantized {
  int64_t rows = 0;
  int64_t features = 0;
  int64_t groups = 0;
  // Codes run from 0 to this, 2^bits - 1.
  int32_t top = 0;
  v1::DataType level_type = v1::DATA_TYPE_F32;
  // [features], below `groups`.
  std::vector<int32_t> group_of;
  // [rows, groups]; scales are positive and finite.
  std::vector<float> scale;
  std::vector<int32_t> zero;
  // Of the same shape: 1 where the weights were too small for the types (Certificate.underflow):
  // the scale is the least normal number of its type, and zero and all codes of the group are
  // 2^(bits-1).
  std::vector<uint8_t> vanishes;
  // [rows, features].
  std::vector<int32_t> codes;
  // [rows, features], the weights that a reader of the result loads.
  Matrix levels;

  size_t Cell(int64_t row, int64_t feature) const {
    return static_cast<size_t>(row * groups + group_of[static_cast<size_t>(feature)]);
  }
  double Step(int64_t row, int64_t feature) const {
    return static_cast<double>(scale[Cell(row, feature)]);
  }
  bool Vanishes(int64_t row, int64_t feature) const { return vanishes[Cell(row, feature)] != 0; }
  int32_t Code(int64_t row, int64_t feature) const {
    return codes[static_cast<size_t>(row * features + feature)];
  }
  float Level(int64_t row, int64_t feature, int32_t code) const;
  // The code whose level is nearest to `value`, of those from `low` to `high`: rint(value / scale)
  // + zero, ties to the even multiple; with half level types a neighbour that is nearer.
  int32_t NearestCode(int64_t row, int64_t feature, float value, int32_t low, int32_t high) const;
};

// Reads the tensors of the spec's format (names, types and shapes: ResultHeader and the layouts of
// GPTQ and compressed-tensors). INVALID_ARGUMENT naming tensor, row and feature where a shape is
// not as announced, a scale is not positive and finite, a zero point or a code lies outside
// [0, 2^bits - 1], groups are not as the spec says, or a dense weight is no level of its grid.
absl::StatusOr<Quantized> ReadQuantized(const v1::QuantizationSpec& spec, int64_t rows,
                                        int64_t features, const TensorByRole& tensor);

}  // namespace certiq::verify

#endif  // CERTIQ_CLIENT_CPP_VERIFY_QUANTIZED_H_
