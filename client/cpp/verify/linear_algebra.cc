#include "linear_algebra.h"

#include <Eigen/Cholesky>
#include <Eigen/Eigenvalues>
#include <algorithm>
#include <atomic>
#include <cmath>
#include <thread>
#include <vector>

#include "absl/status/status.h"

namespace certiq::verify {
namespace {

// Up to here all eigenvalues are computed.
constexpr int64_t kExactEigenvalues = 1500;
constexpr int64_t kPiece = 256;

}  // namespace

void InPieces(int64_t count, int64_t piece, const std::function<void(int64_t, int64_t)>& body) {
  const int64_t pieces = (count + piece - 1) / piece;
  std::atomic<int64_t> next = 0;
  const auto work = [&] {
    for (int64_t i = next++; i < pieces; i = next++) {
      body(i * piece, std::min(count, (i + 1) * piece));
    }
  };
  const int64_t threads = std::min<int64_t>(pieces, std::thread::hardware_concurrency());
  std::vector<std::jthread> others;
  for (int64_t t = 1; t < threads; ++t) others.emplace_back(work);
  work();
}

absl::StatusOr<Factor> ReverseCholesky(const Matrix& h) {
  // With J the reversal, J H J = L L^T, so H = (J L J)(J L J)^T and J L J is upper triangular.
  const Eigen::Index n = h.rows();
  Matrix reversed = h.transpose().reverse();
  // The lower triangle of J H^T J holds the upper one of H^T, which is H's lower.
  const Eigen::LLT<Eigen::Ref<Matrix>, Eigen::Lower> cholesky(reversed);
  if (cholesky.info() != Eigen::Success || !reversed.diagonal().allFinite()) {
    return absl::InvalidArgumentError(
        "H = X~^T X~ + lambda_used I is not positive definite: it has no factor");
  }
  Factor factor;
  factor.u = Matrix::Zero(n, n);
  factor.d.resize(n);
  for (Eigen::Index i = 0; i < n; ++i) {
    const double pivot = reversed(n - 1 - i, n - 1 - i);
    factor.d[i] = pivot * pivot;
  }
  for (Eigen::Index i = 0; i < n; ++i) {
    factor.u(i, i) = 1;
    for (Eigen::Index j = i + 1; j < n; ++j) {
      factor.u(i, j) = reversed(n - 1 - i, n - 1 - j) / reversed(n - 1 - j, n - 1 - j);
    }
  }
  return factor;
}

Matrix Gram(const Matrix& x) {
  Matrix gram(x.cols(), x.cols());
  const Eigen::Index n = x.cols();
  // Columns [begin, end) against those up to `end`: the lower triangle and a little more.
  InPieces(n, kPiece, [&](int64_t begin, int64_t end) {
    gram.block(begin, 0, end - begin, end).noalias() =
        x.middleCols(begin, end - begin).transpose() * x.leftCols(end);
  });
  gram.triangularView<Eigen::StrictlyUpper>() = gram.transpose();
  return gram;
}

Matrix InverseOfUnitUpper(const Matrix& u) {
  const Eigen::Index n = u.rows();
  Matrix inverse = Matrix::Zero(n, n);
  // Columns [begin, end) of the inverse have nothing below row `end`.
  InPieces(n, kPiece, [&](int64_t begin, int64_t end) {
    Matrix columns = Matrix::Zero(end, end - begin);
    columns.bottomRows(end - begin).setIdentity();
    u.topLeftCorner(end, end).triangularView<Eigen::UnitUpper>().solveInPlace(columns);
    inverse.block(0, begin, end, end - begin) = columns;
  });
  return inverse;
}

double OneNormCondition(const Matrix& h, const Matrix& inverse_u, const Vector& d) {
  const Eigen::Index n = h.rows();
  // H^-1 = U^-T D^-1 U^-1; rows of it stand for columns.
  const Matrix scaled = d.cwiseInverse().asDiagonal() * inverse_u;
  Vector sums(n);
  InPieces(n, kPiece, [&](int64_t begin, int64_t end) {
    const Matrix rows =
        inverse_u.block(0, begin, end, end - begin).transpose() * scaled.topRows(end);
    sums.segment(begin, end - begin) = rows.cwiseAbs().rowwise().sum();
  });
  return h.cwiseAbs().colwise().sum().maxCoeff() * sums.maxCoeff();
}

double LargestEigenvalue(const Matrix& s) {
  if (s.rows() <= kExactEigenvalues) {
    const Eigen::SelfAdjointEigenSolver<Eigen::MatrixXd> solver(s, Eigen::EigenvaluesOnly);
    return std::max(0.0, solver.eigenvalues()[s.rows() - 1]);
  }
  // A start that is orthogonal to nothing in particular.
  Vector v(s.rows());
  for (Eigen::Index i = 0; i < v.size(); ++i) v[i] = 1 + 0.5 * std::sin(static_cast<double>(i));
  v.normalize();
  double value = 0;
  for (int step = 0; step < 500; ++step) {
    const Vector next = s * v;
    const double quotient = v.dot(next);
    const double norm = next.norm();
    if (norm == 0) return 0;
    v = next / norm;
    if (std::abs(quotient - value) <= 1e-9 * quotient) return quotient;
    value = quotient;
  }
  return value;
}

void SolveRows(const Factor& factor, Matrix& right) {
  InPieces(right.rows(), kPiece, [&](int64_t begin, int64_t end) {
    Matrix b = right.middleRows(begin, end - begin).transpose();
    factor.u.triangularView<Eigen::UnitUpper>().solveInPlace(b);
    b = factor.d.cwiseInverse().asDiagonal() * b;
    factor.u.transpose().triangularView<Eigen::UnitLower>().solveInPlace(b);
    right.middleRows(begin, end - begin) = b.transpose();
  });
}

}  // namespace certiq::verify
