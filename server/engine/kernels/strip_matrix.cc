#include "engine/kernels/strip_matrix.h"

#include <algorithm>

#include "base/status.h"
#include "engine/kernels/simd.h"

namespace certiq::engine {
namespace {

template <typename T>
int64_t Strips(int64_t rows) {
  return (rows + kStrip<T> - 1) / kStrip<T>;
}

}  // namespace

template <typename T>
BasicStripMatrix<T>::BasicStripMatrix(int64_t rows, int64_t features)
    : rows_(rows),
      features_(features),
      values_(static_cast<size_t>(Strips<T>(rows) * kStrip<T> * features), T{0}) {}

template <typename T>
BasicStripMatrix<T> BasicStripMatrix<T>::Unset(int64_t rows, int64_t features) {
  BasicStripMatrix matrix;
  matrix.rows_ = rows;
  matrix.features_ = features;
  matrix.values_.resize(static_cast<size_t>(Strips<T>(rows) * kStrip<T> * features));
  return matrix;
}

template <typename T>
int64_t BasicStripMatrix<T>::BytesFor(int64_t rows, int64_t features) {
  return Strips<T>(rows) * kStrip<T> * features * static_cast<int64_t>(sizeof(T));
}

template <typename T>
int64_t BasicStripMatrix<T>::StripRows() {
  return kStrip<T>;
}

template <typename T>
int64_t BasicStripMatrix<T>::strips() const {
  return Strips<T>(rows_);
}

template <typename T>
void BasicStripMatrix<T>::SetRow(int64_t r, const T* values) {
  T* to = strip(r / kStrip<T>) + r % kStrip<T>;
  for (int64_t j = 0; j < features_; ++j) to[j * kStrip<T>] = values[j];
}

template <typename T>
void BasicStripMatrix<T>::GetRow(int64_t r, T* values) const {
  const T* from = strip(r / kStrip<T>) + r % kStrip<T>;
  for (int64_t j = 0; j < features_; ++j) values[j] = from[j * kStrip<T>];
}

template <typename T>
T* BasicStripMatrix<T>::strip(int64_t s) {
  return values_.data() + s * features_ * kStrip<T>;
}

template <typename T>
const T* BasicStripMatrix<T>::strip(int64_t s) const {
  return values_.data() + s * features_ * kStrip<T>;
}

template class BasicStripMatrix<float>;
template class BasicStripMatrix<double>;

StripMatrix Copy(const StripMatrix& matrix, Executor& executor) {
  StripMatrix copy = StripMatrix::Unset(matrix.rows(), matrix.features());
  executor.ParallelFor(matrix.strips(), [&](int64_t s) {
    std::copy_n(matrix.strip(s), matrix.features() * kStrip<float>, copy.strip(s));
  });
  return copy;
}

BasicStripMatrix<double> Widen(const StripMatrix& matrix, Executor& executor) {
  auto wide = BasicStripMatrix<double>::Unset(matrix.rows(), matrix.features());
  // A float strip is two double strips side by side.
  executor.ParallelFor(wide.strips(), [&](int64_t s) {
    const float* from = matrix.strip(s / 2) + (s % 2) * kStrip<double>;
    double* to = wide.strip(s);
    for (int64_t j = 0; j < matrix.features(); ++j) {
      for (int64_t c = 0; c < kStrip<double>; ++c) {
        to[j * kStrip<double> + c] = from[j * kStrip<float> + c];
      }
    }
  });
  return wide;
}

std::vector<int64_t> EvenlySpaced(int64_t count, int64_t rows) {
  const int64_t chosen = std::min(count, rows);
  std::vector<int64_t> result(static_cast<size_t>(chosen));
  for (int64_t i = 0; i < chosen; ++i) result[static_cast<size_t>(i)] = i * rows / chosen;
  return result;
}

StripMatrix SelectRows(const StripMatrix& matrix, const std::vector<int64_t>& rows) {
  StripMatrix selected(static_cast<int64_t>(rows.size()), matrix.features());
  for (size_t i = 0; i < rows.size(); ++i) {
    const auto to_row = static_cast<int64_t>(i);
    const float* from = matrix.strip(rows[i] / kStrip<float>) + rows[i] % kStrip<float>;
    float* to = selected.strip(to_row / kStrip<float>) + to_row % kStrip<float>;
    for (int64_t j = 0; j < matrix.features(); ++j) to[j * kStrip<float>] = from[j * kStrip<float>];
  }
  return selected;
}

StripMatrix PermuteColumns(const StripMatrix& matrix, const std::vector<int64_t>& order,
                           Executor& executor) {
  StripMatrix permuted = StripMatrix::Unset(matrix.rows(), matrix.features());
  executor.ParallelFor(matrix.strips(), [&](int64_t s) {
    for (int64_t i = 0; i < matrix.features(); ++i) {
      std::copy_n(matrix.strip(s) + order[static_cast<size_t>(i)] * kStrip<float>, kStrip<float>,
                  permuted.strip(s) + i * kStrip<float>);
    }
  });
  return permuted;
}

absl::Status DecodeRows(DType dtype, const std::byte* bytes, int64_t first_row, int64_t rows,
                        const char* field, StripMatrix& matrix) {
  const int64_t features = matrix.features();
  const int64_t row_bytes = features * ItemSize(dtype);
  const int64_t bad = FindNonFinite(dtype, bytes, rows * features);
  if (bad >= 0) {
    float value = 0;
    DecodeToFloat(dtype, bytes + bad * ItemSize(dtype), 1, &value);
    return base::NonFiniteValue(field, value, first_row + bad / features, bad % features);
  }
  // Some rows at a time, some columns at a time: a line of the strip is written by all of them
  // before it leaves the first-level cache.
  constexpr int64_t kRows = 16;
  constexpr int64_t kColumns = 256;
  float block[kRows][kColumns];
  for (int64_t r0 = 0; r0 < rows;) {
    const int64_t row = first_row + r0;
    // Not beyond the strip.
    const int64_t count = std::min({kRows, rows - r0, kStrip<float> - row % kStrip<float>});
    for (int64_t j0 = 0; j0 < features; j0 += kColumns) {
      const int64_t columns = std::min(kColumns, features - j0);
      for (int64_t r = 0; r < count; ++r) {
        DecodeToFloat(dtype, bytes + (r0 + r) * row_bytes + j0 * ItemSize(dtype), columns,
                      block[r]);
      }
      float* to = matrix.strip(row / kStrip<float>) + j0 * kStrip<float> + row % kStrip<float>;
      for (int64_t j = 0; j < columns; ++j) {
        for (int64_t r = 0; r < count; ++r) to[j * kStrip<float> + r] = block[r][j];
      }
    }
    r0 += count;
  }
  return absl::OkStatus();
}

}  // namespace certiq::engine
