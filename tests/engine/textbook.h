// The specification of the engine's numerics: float64, unblocked, three
// loops, written from the formulas and from nothing in server/.

#ifndef CERTIQ_TESTS_ENGINE_TEXTBOOK_H_
#define CERTIQ_TESTS_ENGINE_TEXTBOOK_H_

#include <cstddef>
#include <cstdint>
#include <vector>

namespace certiq::textbook {

// Row-major, dense.
struct Matrix {
  int64_t rows = 0;
  int64_t cols = 0;
  std::vector<double> values;

  Matrix() = default;
  Matrix(int64_t r, int64_t c) : rows(r), cols(c), values(static_cast<size_t>(r * c)) {}
  double& operator()(int64_t i, int64_t j) { return values[static_cast<size_t>(i * cols + j)]; }
  double operator()(int64_t i, int64_t j) const {
    return values[static_cast<size_t>(i * cols + j)];
  }
};

// X^T X.
Matrix Gram(const Matrix& x);

// |A|_F^2 and |X a|_2^2.
double SquaredNorm(const Matrix& a);
double SquaredImage(const Matrix& x, const std::vector<double>& a);

// (M1) H = U D U^T, U unit upper triangular; false where a pivot is not positive.
bool ReverseFactor(const Matrix& h, Matrix& u, std::vector<double>& d);

// A code u stands for scale (u - zero); one group a row of scales [groups].
struct RowGrid {
  std::vector<double> scale;
  std::vector<double> zero;
  int64_t group_size = 0;
  int lowest = 0;
  int highest = 0;

  size_t GroupOf(int64_t j) const {
    return group_size == 0 ? 0 : static_cast<size_t>(j / group_size);
  }
  double Level(int64_t j, int code) const { return scale[GroupOf(j)] * (code - zero[GroupOf(j)]); }
  // Nearest code, ties to even.
  int Code(int64_t j, double value) const;
};

// (S1) of one row. Scales are rounded to float32 like the engine's default.
RowGrid AbsmaxGrid(const std::vector<double>& w, int bits, bool symmetric, int64_t group_size);

struct RoundedRow {
  std::vector<int> codes;
  // v_j before rounding, e_j = v_j - q_j.
  std::vector<double> target;
  std::vector<double> error;
  std::vector<double> level;
};

// (M2) on one row.
RoundedRow Optq(const std::vector<double>& w, const Matrix& u, const RowGrid& grid);

}  // namespace certiq::textbook

#endif  // CERTIQ_TESTS_ENGINE_TEXTBOOK_H_
