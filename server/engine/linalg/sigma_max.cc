#include "engine/linalg/sigma_max.h"

#include <Eigen/Eigenvalues>
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>

#include "base/status_macros.h"
#include "engine/linalg/udu_factor.h"

namespace certiq::engine {
namespace {

using Vector = Eigen::VectorXd;

Vector Multiply(const UpperTriangle<double>& s, const Vector& x) {
  Vector y = Vector::Zero(s.size());
  for (int64_t i = 0; i < s.size(); ++i) {
    const double* row = s.row(i);
    double sum = row[0] * x[i];
    for (int64_t j = i + 1; j < s.size(); ++j) {
      sum += row[j - i] * x[j];
      y[j] += row[j - i] * x[i];
    }
    y[i] += sum;
  }
  return y;
}

// A start without structure: a multiplicative generator, Gaussian by sums.
Vector Start(int64_t size) {
  Vector start(size);
  uint64_t state = 0x9e3779b97f4a7c15u;
  for (int64_t i = 0; i < size; ++i) {
    double sum = 0;
    for (int k = 0; k < 4; ++k) {
      state = state * 6364136223846793005u + 1442695040888963407u;
      sum += static_cast<double>(state >> 11) * 0x1p-53 - 0.5;
    }
    start[i] = sum;
  }
  return start.normalized();
}

}  // namespace

absl::StatusOr<double> LargestEigenvalue(const UpperTriangle<double>& s,
                                         const RunContext& context) {
  constexpr int64_t kSteps = 128;
  const int64_t steps = std::min(kSteps, s.size());
  Eigen::MatrixXd basis(s.size(), steps);
  Vector diagonal(steps);
  Vector beside(steps);
  Vector q = Start(s.size());
  double ritz = 0;
  for (int64_t k = 0; k < steps; ++k) {
    if (context.cancelled()) return context.CancellationStatus();
    basis.col(k) = q;
    Vector r = Multiply(s, q);
    diagonal[k] = q.dot(r);
    // Twice is enough (Parlett).
    for (int pass = 0; pass < 2; ++pass) {
      r -= basis.leftCols(k + 1) * (basis.leftCols(k + 1).transpose() * r);
    }
    beside[k] = r.norm();
    Eigen::SelfAdjointEigenSolver<Eigen::MatrixXd> solver;
    solver.computeFromTridiagonal(diagonal.head(k + 1), beside.head(k), Eigen::EigenvaluesOnly);
    const double largest = solver.eigenvalues()[k];
    if (k > 0 && largest - ritz <= 1e-12 * largest) return std::max(ritz, largest);
    ritz = largest;
    if (beside[k] <= 1e-14 * largest) return ritz;
    q = r / beside[k];
  }
  return ritz;
}

absl::StatusOr<double> LargestEigenvalueBound(const UpperTriangle<double>& s,
                                              const RunContext& context) {
  ASSIGN_OR_RETURN(const double ritz, LargestEigenvalue(s, context));
  if (ritz <= 0) return 0;
  UpperTriangle<double> negative = s;
  for (int64_t i = 0; i < s.size(); ++i) {
    for (int64_t j = i; j < s.size(); ++j) negative.at(i, j) = -s.at(i, j);
  }
  const std::vector<bool> none(static_cast<size_t>(s.size()), false);
  // Sums that are not finite have no finite bound.
  for (double margin = 1e-4; std::isfinite(ritz * (1 + margin)); margin *= 4) {
    const double bound = ritz * (1 + margin);
    ASSIGN_OR_RETURN(FactorAttempt attempt,
                     FactorDamped(negative, none, bound, FactorUse::kCertify, context));
    // All pivots were positive; how well conditioned it is does not matter.
    if (attempt.cause == StabilityCause::kNone || attempt.cause == StabilityCause::kCondition) {
      return bound;
    }
  }
  return std::numeric_limits<double>::infinity();
}

}  // namespace certiq::engine
