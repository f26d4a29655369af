// Strip matrix: rows of weights side by side, in the layout the kernels read.

#ifndef CERTIQ_ENGINE_KERNELS_STRIP_MATRIX_H_
#define CERTIQ_ENGINE_KERNELS_STRIP_MATRIX_H_

#include <cstddef>
#include <cstdint>
#include <vector>

#include "absl/status/status.h"
#include "engine/kernels/aligned.h"
#include "engine/kernels/dtype.h"
#include "engine/run_context.h"

namespace certiq::engine {

// A matrix [rows, features] stored as strips of StripRows() rows, each strip
// feature-major: [features][StripRows()], so that a kernel works on the rows
// of a strip side by side while features pass in order. Rows that pad the
// last strip are zero. Different rows may be written from different threads.
// T is float or double; a strip of doubles holds half as many rows.
template <typename T>
class BasicStripMatrix {
 public:
  BasicStripMatrix() = default;
  // All zero.
  BasicStripMatrix(int64_t rows, int64_t features);
  // Elements have no value yet: for strips that are written whole, padding rows too, by the threads
  // that first touch their memory.
  static BasicStripMatrix Unset(int64_t rows, int64_t features);

  // Bytes that a matrix of this shape holds.
  static int64_t BytesFor(int64_t rows, int64_t features);
  // Rows in a strip; depends on the instruction set.
  static int64_t StripRows();

  int64_t rows() const { return rows_; }
  int64_t features() const { return features_; }
  int64_t strips() const;

  // Copies `features()` values in or out of row r.
  void SetRow(int64_t r, const T* values);
  void GetRow(int64_t r, T* values) const;

  // [features()][StripRows()], the rows from s * StripRows() on.
  T* strip(int64_t s);
  const T* strip(int64_t s) const;

 private:
  int64_t rows_ = 0;
  int64_t features_ = 0;
  UnsetVector<T> values_;
};

using StripMatrix = BasicStripMatrix<float>;

// The same matrix, by all threads.
StripMatrix Copy(const StripMatrix& matrix, Executor& executor);
// The same values in float64.
BasicStripMatrix<double> Widen(const StripMatrix& matrix, Executor& executor);
// At most `count` of `rows` rows, all of them where there are no more.
std::vector<int64_t> EvenlySpaced(int64_t count, int64_t rows);
// Some of the rows, in this order.
StripMatrix SelectRows(const StripMatrix& matrix, const std::vector<int64_t>& rows);
// Columns in another order: column i of the result is column order[i].
StripMatrix PermuteColumns(const StripMatrix& matrix, const std::vector<int64_t>& order,
                           Executor& executor);

// Decodes `rows` rows at `bytes` into rows first_row... of `matrix`. A value that is not
// finite (or beyond float32) is refused with INVALID_ARGUMENT naming `field`, row and column.
absl::Status DecodeRows(DType dtype, const std::byte* bytes, int64_t first_row, int64_t rows,
                        const char* field, StripMatrix& matrix);

}  // namespace certiq::engine

#endif  // CERTIQ_ENGINE_KERNELS_STRIP_MATRIX_H_
