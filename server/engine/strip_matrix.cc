#include "engine/strip_matrix.h"

#include "engine/simd.h"
#include "engine/status.h"

namespace certiq::engine {
namespace {
constexpr int64_t kWidth = kStrip<float>;
int64_t Strips(int64_t rows) { return (rows + kWidth - 1) / kWidth; }
}  // namespace

StripMatrix::StripMatrix(int64_t rows, int64_t features)
    : rows_(rows),
      features_(features),
      values_(static_cast<size_t>(Strips(rows) * kWidth * features)) {}

int64_t StripMatrix::BytesFor(int64_t rows, int64_t features) {
  return Strips(rows) * kWidth * features * 4;
}

int64_t StripMatrix::StripRows() { return kWidth; }

int64_t StripMatrix::strips() const { return Strips(rows_); }

void StripMatrix::SetRow(int64_t r, const float* values) {
  float* to = strip(r / kWidth) + r % kWidth;
  for (int64_t j = 0; j < features_; ++j) to[j * kWidth] = values[j];
}

void StripMatrix::GetRow(int64_t r, float* values) const {
  const float* from = strip(r / kWidth) + r % kWidth;
  for (int64_t j = 0; j < features_; ++j) values[j] = from[j * kWidth];
}

float* StripMatrix::strip(int64_t s) { return values_.data() + s * features_ * kWidth; }
const float* StripMatrix::strip(int64_t s) const { return values_.data() + s * features_ * kWidth; }

absl::Status DecodeRows(DType dtype, const std::byte* bytes, int64_t first_row, int64_t rows,
                        const char* field, StripMatrix& matrix) {
  std::vector<float> row(static_cast<size_t>(matrix.features()));
  for (int64_t r = 0; r < rows; ++r) {
    const int64_t bad = DecodeToFloat(dtype, bytes + r * matrix.features() * ItemSize(dtype),
                                      matrix.features(), row.data());
    if (bad >= 0) {
      return NonFiniteValue(field, row[static_cast<size_t>(bad)], first_row + r, bad);
    }
    matrix.SetRow(first_row + r, row.data());
  }
  return absl::OkStatus();
}

}  // namespace certiq::engine
