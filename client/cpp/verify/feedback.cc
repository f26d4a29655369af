#include "feedback.h"

#include <algorithm>
#include <cmath>
#include <utility>

#include "base/status_macros.h"

namespace certiq::verify {
namespace {

// Columns of a [R, N] matrix in working order.
Matrix Worked(const Matrix& m, const std::vector<int64_t>& order) {
  Matrix result(m.rows(), m.cols());
  for (Eigen::Index i = 0; i < m.cols(); ++i) result.col(i) = m.col(order[static_cast<size_t>(i)]);
  return result;
}

Matrix DampedGram(const Layer& layer, const std::vector<int64_t>& order, double lambda) {
  const Eigen::Index n = layer.gram.rows();
  // A dead feature stands apart from the others; its pivot is only to be harmless (D3).
  const double mean = layer.gram.trace() / static_cast<double>(n);
  Matrix h(n, n);
  for (Eigen::Index i = 0; i < n; ++i) {
    const int64_t from = order[static_cast<size_t>(i)];
    for (Eigen::Index k = 0; k < n; ++k) h(i, k) = layer.gram(from, order[static_cast<size_t>(k)]);
    h(i, i) += layer.dead[static_cast<size_t>(from)] ? lambda + mean : lambda;
  }
  return h;
}

// The service adds products of float32 in chains of 16, then in float64. One chain of products of
// size p is off by about 11 2^-24 p (rounding errors of the 16 partial sums kp, k = 1..16, taken as
// independent), the m/16 chains of H_ij so by 2.8 2^-24 sqrt(H_ii H_jj / m); a matrix of such
// errors has a norm of at most 2 sqrt(N) times that (in units where H_ii = 1). Divided by the
// smallest eigenvalue of H in these units it is the relative error of any x H x^T, and of every
// D_j. Negligible with usual damping.
double SumsSlack(const Matrix& h, const Factor& factor, int64_t tokens) {
  const Eigen::Index n = h.rows();
  const Vector scale = h.diagonal().cwiseSqrt();
  Matrix v = Matrix::Ones(1, n);
  for (Eigen::Index i = 0; i < n; ++i) v(0, i) += 0.5 * std::sin(static_cast<double>(i));
  v.normalize();
  double inverse_smallest = 0;
  for (int step = 0; step < 30; ++step) {
    v = v * scale.asDiagonal();
    SolveRows(factor, v);
    v = v * scale.asDiagonal();
    inverse_smallest = v.norm();
    v /= inverse_smallest;
  }
  const double share = static_cast<double>(n) / static_cast<double>(tokens);
  return 2 * 2.8 * 0x1p-24 * std::sqrt(share) * inverse_smallest;
}

// (M4), (M5), (M7), (M8), (B3) for mismatched inputs. With y = X~^T P w = (G - H) w:
//   v_1 = w_1 + y_1 / H_11;  v_2.. = w_2.. + H_22^-1 (y_2.. + t H_21),  t = w_1 - q_1;
//   |X^ w - q_1 X~_1 - X~_2.. v|^2 = |P w|^2 + 2 t y_1 + t^2 H_11 - c^T H_22^-1 c,
//     c = y_2.. + t H_21: the distance of P w + t X~_1 from the span of the later columns;
//   t = -y_1 / H_11 makes that the initial term of (B3); the floor is |P w|^2 - y^T H^-1 y.
void StartQronos(const OutputErrors& errors, const Matrix& w, const Matrix& q, Feedback& f) {
  const Eigen::Index n = w.cols();
  const Matrix y = Worked(errors.residual_products, f.order);
  const double h11 = f.h(0, 0);
  const Vector y1 = y.col(0);
  f.first_target = w.col(0) + y1 / h11;

  const Matrix solved = [&] {
    Matrix x = y;
    SolveRows(f.factor, x);
    return x;
  }();
  f.floor = errors.residual - y.cwiseProduct(solved).rowwise().sum();
  const Factor later{f.factor.u.bottomRightCorner(n - 1, n - 1), f.factor.d.tail(n - 1)};
  const auto initial = [&](const Vector& t, Matrix* solution) -> Vector {
    Matrix c = y.rightCols(n - 1);
    c.noalias() += t * f.h.row(0).tail(n - 1);
    *solution = c;
    SolveRows(later, *solution);
    const Vector projected = c.cwiseProduct(*solution).rowwise().sum();
    return (errors.residual + 2 * t.cwiseProduct(y1) + h11 * t.cwiseAbs2() - projected).cwiseMax(0);
  };
  Matrix solution;
  f.prior_initial = initial(-y1 / h11, &solution);
  f.unrounded = w;
  f.unrounded.col(0) = f.first_target;
  f.unrounded.rightCols(n - 1) += solution;
  f.initial = initial(w.col(0) - q.col(0), &solution);
  f.floor = f.floor.cwiseMax(0);
  f.start = w;
  f.start.col(0) = q.col(0);
  f.start.rightCols(n - 1) += solution;
}

absl::StatusOr<Feedback> RecomputeIn(const std::vector<int64_t>& order, const Layer& layer,
                                     const v1::QuantizationSpec& spec, double lambda,
                                     const OutputErrors& errors) {
  Feedback f;
  f.order = order;
  f.h = DampedGram(layer, order, lambda);
  ASSIGN_OR_RETURN(f.factor, ReverseCholesky(f.h));
  const bool mismatched = layer.fit.x_quantized.has_value();
  const Matrix w = Worked(layer.live_w, order);
  const Matrix q = Worked(layer.q.levels, order);
  if (mismatched && spec.method() == v1::METHOD_QRONOS) {
    StartQronos(errors, w, q, f);
  } else {
    f.start = w;
    f.unrounded = w;
    f.initial = mismatched ? errors.residual : Vector::Zero(w.rows());
    f.prior_initial = f.initial;
    f.floor = Vector::Zero(w.rows());
  }
  f.e.resize(w.rows(), w.cols());
  InPieces(w.rows(), 256, [&](int64_t begin, int64_t end) {
    f.e.middleRows(begin, end - begin).noalias() = (f.start - q).middleRows(begin, end - begin) *
                                                   f.factor.u.triangularView<Eigen::UnitUpper>();
  });
  if (f.first_target.size() > 0) f.e.col(0) = f.first_target - q.col(0);
  return f;
}

// The order of work is by norm, of sums in which neighbours within 1e-6 may change places. Which
// way round two neighbours of nearly equal norm were worked on shows in e: the wrong way, errors
// leave their cells. Swapping features i, i+1 touches nothing else: with the Schur complement
// S = [[D_1 + u^2 D_2, u D_2], [u D_2, D_2]] of the two over the later ones and a = (e_1, e_2 - u
// e_1), the errors would have been e'_2 = a_2 first and then e'_1 = a_1 + (S_12 / S_11) a_2.
// Returns how many pairs were the other way round, and swaps them in `order`.
int64_t SettleTies(const Layer& layer, const v1::QuantizationSpec& spec, const Feedback& f,
                   std::vector<int64_t>& order) {
  // Polished codes leave their cells whatever the order.
  if (spec.order() != v1::ORDER_DECREASING_NORM || spec.polish() > 0) return 0;
  // Each norm is off by at most 9e-7.
  constexpr double kNear = 2e-6;
  const double cell = spec.rounding() == v1::ROUNDING_STOCHASTIC ? 1 : 0.5;
  int64_t swapped = 0;
  const Eigen::Index first = f.first_target.size() > 0 ? 1 : 0;
  for (Eigen::Index i = first; i + 1 < f.e.cols(); ++i) {
    const int64_t one = order[static_cast<size_t>(i)];
    const int64_t two = order[static_cast<size_t>(i + 1)];
    const double norm = layer.gram(one, one);
    const double next = layer.gram(two, two);
    if (norm == 0 || norm == next || norm - next > kNear * norm) continue;
    const double u = f.factor.u(i, i + 1);
    const double s12 = u * f.factor.d[i + 1];
    const double s11 = f.factor.d[i] + u * s12;
    // How far errors leave their cells, in steps, as worked on and the other way round.
    double outside = 0;
    double outside_swapped = 0;
    const auto beyond = [&](Eigen::Index r, int64_t feature, double e) {
      // Outermost codes may be any distance away; others are in their cell, but for float32.
      const int32_t code = layer.q.Code(r, feature);
      if (code == 0 || code == layer.q.top || layer.q.Vanishes(r, feature)) return 0.0;
      return std::max(0.0, std::abs(e) / layer.q.Step(r, feature) - cell - 2e-5);
    };
    for (Eigen::Index r = 0; r < f.e.rows(); ++r) {
      const double a1 = f.e(r, i);
      const double a2 = f.e(r, i + 1) - u * a1;
      outside += beyond(r, one, a1) + beyond(r, two, f.e(r, i + 1));
      outside_swapped += beyond(r, two, a2) + beyond(r, one, a1 + s12 / s11 * a2);
    }
    if (outside_swapped < outside) {
      std::swap(order[static_cast<size_t>(i)], order[static_cast<size_t>(i + 1)]);
      ++swapped;
      ++i;
    }
  }
  return swapped;
}

}  // namespace

absl::StatusOr<Feedback> Recompute(const Layer& layer, const v1::QuantizationSpec& spec,
                                   double lambda, const OutputErrors& errors) {
  ASSIGN_OR_RETURN(Feedback f, RecomputeIn(layer.order, layer, spec, lambda, errors));
  // Three near-equal neighbours may need a second round.
  int64_t swapped = 0;
  for (int round = 0; round < 3; ++round) {
    std::vector<int64_t> order = f.order;
    const int64_t found = SettleTies(layer, spec, f, order);
    if (found == 0) break;
    swapped += found;
    ASSIGN_OR_RETURN(f, RecomputeIn(order, layer, spec, lambda, errors));
  }
  f.swapped = swapped;
  f.inverse_u = InverseOfUnitUpper(f.factor.u);
  f.slack = SumsSlack(f.h, f.factor, layer.fit.x.rows());
  return f;
}

}  // namespace certiq::verify
