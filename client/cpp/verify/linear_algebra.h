// Factorisation (M1) of H, its condition and its largest eigenvalue, in float64.
#ifndef CERTIQ_CLIENT_CPP_VERIFY_LINEAR_ALGEBRA_H_
#define CERTIQ_CLIENT_CPP_VERIFY_LINEAR_ALGEBRA_H_

#include <cstdint>
#include <functional>

#include "absl/status/statusor.h"
#include "matrix.h"

namespace certiq::verify {

// (M1) H = U D U^T.
struct Factor {
  // [N, N], unit upper triangular; zeros below.
  Matrix u;
  // [N], positive.
  Vector d;
};

// Factors H, symmetric [N, N]; only its lower triangle is read. INVALID_ARGUMENT where it is not
// positive definite. N^3 / 3 flops.
absl::StatusOr<Factor> ReverseCholesky(const Matrix& h);

// X^T X [N, N], both triangles, of X [m, N].
Matrix Gram(const Matrix& x);

// U^-1, unit upper triangular.
Matrix InverseOfUnitUpper(const Matrix& u);

// |H|_1 |H^-1|_1, exactly, with U^-1 at hand; the largest sum of magnitudes of a column. N^3 flops.
double OneNormCondition(const Matrix& h, const Matrix& inverse_u, const Vector& d);

// The largest eigenvalue of a symmetric positive semidefinite matrix: exact up to N = 1500, above
// that by power iteration, from below, rarely off by more than 1e-3.
double LargestEigenvalue(const Matrix& s);

// Rows of x that solve x H = b for every row b of `right`, in place.
void SolveRows(const Factor& factor, Matrix& right);

// Calls body(begin, end) on consecutive pieces of [0, count), at most `piece` long, on as many
// threads as the machine has. The pieces must not touch common data.
void InPieces(int64_t count, int64_t piece, const std::function<void(int64_t, int64_t)>& body);

}  // namespace certiq::verify

#endif  // CERTIQ_CLIENT_CPP_VERIFY_LINEAR_ALGEBRA_H_
