// Rows of weights in the layout the kernels read.

#ifndef CERTIQ_ENGINE_STRIP_MATRIX_H_
#define CERTIQ_ENGINE_STRIP_MATRIX_H_

#include <cstddef>
#include <cstdint>
#include <vector>

#include "absl/status/status.h"
#include "engine/dtype.h"

namespace certiq::engine {

// A float32 matrix [rows, features] stored as strips of kStrip rows, each
// strip feature-major: [features][kStrip], so that a kernel works on the rows
// of a strip side by side while features pass in order. Rows that pad the
// last strip are zero. Different rows may be written from different threads.
class StripMatrix {
 public:
  StripMatrix() = default;
  StripMatrix(int64_t rows, int64_t features);

  // Bytes that a matrix of this shape holds.
  static int64_t BytesFor(int64_t rows, int64_t features);
  // Rows in a strip; depends on the instruction set.
  static int64_t StripRows();

  int64_t rows() const { return rows_; }
  int64_t features() const { return features_; }
  int64_t strips() const;

  // Copies `features()` values in or out of row r.
  void SetRow(int64_t r, const float* values);
  void GetRow(int64_t r, float* values) const;

  // [features()][StripRows()], the rows from s * StripRows() on.
  float* strip(int64_t s);
  const float* strip(int64_t s) const;

 private:
  int64_t rows_ = 0;
  int64_t features_ = 0;
  std::vector<float> values_;
};

// Decodes `rows` rows at `bytes` into rows first_row... of `matrix`. A value that is not
// finite (or beyond float32) is refused with INVALID_ARGUMENT naming `field`, row and column.
absl::Status DecodeRows(DType dtype, const std::byte* bytes, int64_t first_row, int64_t rows,
                        const char* field, StripMatrix& matrix);

}  // namespace certiq::engine

#endif  // CERTIQ_ENGINE_STRIP_MATRIX_H_
