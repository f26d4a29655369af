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

// (M2) with steps that each run of group_size features takes from the updated
// weights, updated column by column: after column k is rounded with error e_k,
// w_j += e_k L_kj / L_kk for j > k, L L^T = H^-1 (the formulation of the OPTQ paper).
RoundedRow DynamicOptq(const std::vector<double>& w, const Matrix& h, int bits, bool symmetric,
                       int64_t group_size, RowGrid& grid);

// H^-1 by Gauss-Jordan elimination with pivoting.
Matrix Inverse(const Matrix& h);

// Qronos on one row, as the paper states it: q_1 by (M4); then, column after column, the target is
// the minimiser of |X^ w - X^~ q|^2 over the columns not yet rounded, by normal equations. `h`
// and `g` are damped: X~^T X~ + lambda I, X~^T X + lambda I.
RoundedRow Qronos(const std::vector<double>& w, const Matrix& h, const Matrix& g,
                  const RowGrid& grid);

// X~^T X and so on.
Matrix CrossGram(const Matrix& a, const Matrix& b);

// min over all real q of |X^ w - X^~ q|^2 (M8), damped sums.
double Floor(const std::vector<double>& w, const Matrix& h, const Matrix& g, const Matrix& c);

// a^T M b.
double Form(const std::vector<double>& a, const Matrix& m, const std::vector<double>& b);

}  // namespace certiq::textbook

#endif  // CERTIQ_TESTS_ENGINE_TEXTBOOK_H_
