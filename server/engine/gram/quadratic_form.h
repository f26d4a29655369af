// Quadratic forms x^T S x of many rows, and the output errors that follow from sums alone.

#ifndef CERTIQ_ENGINE_GRAM_QUADRATIC_FORM_H_
#define CERTIQ_ENGINE_GRAM_QUADRATIC_FORM_H_

#include <cstdint>
#include <vector>

#include "absl/status/statusor.h"
#include "engine/gram/gram.h"
#include "engine/kernels/strip_matrix.h"
#include "engine/kernels/upper_triangle.h"
#include "engine/run_context.h"

namespace certiq::engine {

// x_r^T S x_r for every row of `rows`; S symmetric positive semidefinite,
// upper triangle given. With S = X^T X this is |X x_r|^2. Products are of type T, sums over
// features float64: relative to sum_ij |x_i S_ij x_j| the error is of the order of sqrt(N) times
// T's unit roundoff; what it takes below zero is zero. S is scaled by a power of two so that T
// holds it. Costs R N^2 flops (one triangle). Fails only by cancellation.
template <typename T>
absl::StatusOr<std::vector<double>> QuadraticForms(const UpperTriangle<double>& s,
                                                   const BasicStripMatrix<T>& rows, Phase phase,
                                                   const RunContext& context);

// W K [R, N] for a row-major square K: row r is K^T w_r. Float64. Costs 2 R N^2 flops.
// Fails only by cancellation.
absl::StatusOr<BasicStripMatrix<double>> TimesSquare(const BasicStripMatrix<double>& w,
                                                     const std::vector<double>& k, Phase phase,
                                                     const RunContext& context);

// a_r . b_r for every row.
std::vector<double> RowDots(const BasicStripMatrix<double>& a, const BasicStripMatrix<double>& b,
                            Executor& executor);

// |row|^2 of every row.
std::vector<double> RowNorms(const StripMatrix& rows, Executor& executor);

double Sum(const std::vector<double>& values);
// Square roots of all.
std::vector<double> Roots(const std::vector<double>& squares);
// sqrt(squared_error / energy), 0 where both are 0.
double RelativeError(double squared_error, double energy);

// What mismatched inputs cost W before anything is rounded, with P = X - X~.
struct InitialError {
  // |P w_r|^2 for every row.
  std::vector<double> squares;
  // X~^T P w_r for every row.
  BasicStripMatrix<double> cross;
};

// Float64. Costs 3 R N^2 flops. REQUIRES: mismatched inputs. Fails only by cancellation.
absl::StatusOr<InitialError> ComputeInitialError(const Statistics& statistics,
                                                 const BasicStripMatrix<double>& weights,
                                                 Phase phase, const RunContext& context);

// |X w_r - X~ q_r|^2 for every row, from the sums; `change` is W - Q. With X w - X~ q = P w + X~ (w
// - q) it is |P w|^2 + 2 (w - q)^T X~^T P w + |X~ (w - q)|^2: no large terms cancel. Matched
// inputs: the last term, in float32; else float64. Rounding, or sums that are not those of any
// tokens, may take it below zero (LiftToRounding). `initial` is that of W, or null to have it
// computed.
absl::StatusOr<std::vector<double>> SquaredErrors(const Statistics& statistics,
                                                  const StripMatrix& weights,
                                                  const StripMatrix& change,
                                                  const InitialError* initial, Phase phase,
                                                  const RunContext& context);

// |X w_r|^2 for every row, in float32: one form of X^T X, which is put together from the sums;
// below zero as SquaredErrors.
absl::StatusOr<std::vector<double>> ReferenceEnergies(const Statistics& statistics,
                                                      const StripMatrix& weights, Phase phase,
                                                      const RunContext& context);

// SquaredErrors, all in float64.
absl::StatusOr<std::vector<double>> ExactSquaredErrors(const Statistics& statistics,
                                                       const BasicStripMatrix<double>& weights,
                                                       const BasicStripMatrix<double>& change,
                                                       const InitialError* initial, Phase phase,
                                                       const RunContext& context);

}  // namespace certiq::engine

#endif  // CERTIQ_ENGINE_GRAM_QUADRATIC_FORM_H_
