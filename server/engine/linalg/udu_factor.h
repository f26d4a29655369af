// UDU factorisation H = U D U^T from the far end (M1), its condition and its solves.

#ifndef CERTIQ_ENGINE_LINALG_UDU_FACTOR_H_
#define CERTIQ_ENGINE_LINALG_UDU_FACTOR_H_

#include <cstdint>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "engine/kernels/upper_triangle.h"
#include "engine/linalg/stability.h"
#include "engine/run_context.h"

namespace certiq::engine {

// (M1) H = U D U^T with U [N, N] unit upper triangular and D [N] > 0
// diagonal, float64: an ordinary Cholesky factorisation of H with rows and
// columns reversed. D_j is the squared distance of column j of the augmented
// activations from the span of the columns after it.
struct Factor {
  // Strictly above the diagonal: U. The diagonal itself is one and not stored. Of no size where the
  // factor was made in float32.
  UpperTriangle<double> u;
  // U then.
  UpperTriangle<float> narrow;
  std::vector<double> d;
  // Lower bound, usually within a factor of three, of the 1-norm condition
  // number |H|_1 |H^-1|_1 (Higham, Accuracy and Stability of Numerical Algorithms, Alg. 15.1).
  double condition = 0;
};

// What a factor is for.
enum class FactorUse {
  // A result and its certificate: float64, and the condition number is estimated.
  kCertify,
  // Comparing values of lambda by the errors that they lead to. Float32 where that disturbs H by
  // far less than lambda does. The condition number is estimated only where it could be too large:
  // |H|_2 <= trace H, and no eigenvalue is below lambda. Else it stays 0.
  kJudge,
};

// The result of one try.
struct FactorAttempt {
  StabilityCause cause = StabilityCause::kNone;
  std::string detail;
  // Meaningful where cause is kNone.
  Factor factor;
};

// Factors H = gram + lambda I. `gram` is a symmetric matrix of which the upper
// triangle is given. Features marked in `dead` (zero rows and columns of gram) are left
// out: their row and column of U are those of the identity, their D is lambda + trace / N. Costs
// N^3/3 multiply-adds of two flops; blocked, the result does not depend on the
// executor. Fails only by cancellation; a stability failure is reported in the attempt.
absl::StatusOr<FactorAttempt> FactorDamped(const UpperTriangle<double>& gram,
                                           const std::vector<bool>& dead, double lambda,
                                           FactorUse use, const RunContext& context);

// U in float64, whichever it was made in: `room` is for what has to be converted.
const UpperTriangle<double>& WideU(const Factor& factor, UpperTriangle<double>& room,
                                   Executor& executor);

// D with zeros for dead features.
std::vector<double> LiveD(const Factor& factor, const std::vector<bool>& dead);

// The largest condition estimate accepted for N features: past 1 / (8 N u), u = 2^-53, a
// solve with the factor may have no correct digit.
double LargestCondition(int64_t features);

// Solves H x = b in place with the factor: U y = b, z = D^-1 y, U^T x = z.
// REQUIRES: it was made in float64.
void SolveInPlace(const Factor& factor, std::vector<double>& x, Executor& executor);

}  // namespace certiq::engine

#endif  // CERTIQ_ENGINE_LINALG_UDU_FACTOR_H_
