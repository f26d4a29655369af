#include <algorithm>
#include <cmath>
#include <limits>
#include <optional>

#include "absl/strings/str_cat.h"
#include "checks.h"
#include "linear_algebra.h"

namespace certiq::verify {
namespace {

struct Clipping {
  // Low: weights and rows that clip for certain; high: those that may.
  int64_t weights_low = 0;
  int64_t weights_high = 0;
  int64_t rows_low = 0;
  int64_t rows_high = 0;
  // The worst overshoot, in steps.
  Range overshoot;
};

// Nearest: |e| beyond half a step (1 + 1e-6), outward of the outermost code. Stochastic: a target
// beyond the outermost levels. `over` is how far beyond, in steps; what lies within the slack of
// the edge may count or not.
Clipping CountClipped(const Evidence& evidence) {
  const Quantized& q = evidence.layer.q;
  Clipping clipping;
  // An explicit grid may have left codes out, which the certificate does not say: targets beyond
  // those in use may count.
  const auto [least, most] = std::minmax_element(q.codes.begin(), q.codes.end());
  for (Eigen::Index r = 0; r < evidence.e.rows(); ++r) {
    int64_t certain = 0;
    int64_t possible = 0;
    for (Eigen::Index i = 0; i < evidence.e.cols(); ++i) {
      // What vanishes has no edge.
      if (q.Vanishes(r, evidence.Feature(i))) continue;
      const double step = evidence.Step(r, i);
      double over = std::abs(evidence.e(r, i)) / step - 0.5;
      double most_over = over;
      double slack = evidence.ErrorSlack(r, i) / step;
      if (evidence.nearest()) {
        const int32_t code = q.Code(r, evidence.Feature(i));
        const bool above = evidence.e(r, i) > 0;
        constexpr double kInside = -1;
        if (above ? code < *most : code > *least) most_over = kInside;
        if (above ? code < q.top : code > 0) over = kInside;
      } else {
        const double position =
            evidence.Target(r, i) / step + q.zero[q.Cell(r, evidence.Feature(i))];
        over = std::max(-position, position - q.top);
        most_over = std::max(*least - position, position - *most);
        // The position is a float32.
        slack += 0x1p-22 * (std::abs(position) + q.top);
      }
      const double edge = evidence.nearest() ? 0.5e-6 : 1e-6;
      if (over - slack > edge) ++certain;
      if (most_over + slack > edge) {
        ++possible;
        clipping.overshoot.high = std::max(clipping.overshoot.high, most_over + slack);
        clipping.overshoot.low = std::max(clipping.overshoot.low, over - slack);
      }
    }
    clipping.weights_low += certain;
    clipping.weights_high += possible;
    clipping.rows_low += certain > 0 ? 1 : 0;
    clipping.rows_high += possible > 0 ? 1 : 0;
  }
  // What may not clip at all has no overshoot.
  if (clipping.weights_low == 0) clipping.overshoot.low = 0;
  return clipping;
}

// (B6) with e_j = v_j - q_j: v_j = t_j - sum_{k<j} e_k (U^-1)_kj, where t is what targets are as
// long as nothing is rounded. How far that may move targets: nearest m_j = sum_k (delta_k / 2)
// |(U^-1)_kj|; stochastic m_j = sqrt(2 ln(2 R N / eps) sum_k delta_k^2 (U^-1)_kj^2 / 4). Dead
// features leave nothing behind.
Matrix Margins(const Evidence& evidence) {
  const Quantized& q = evidence.layer.q;
  const Eigen::Index n = evidence.e.cols();
  Matrix margins = Matrix::Zero(q.rows, n);
  if (!evidence.feedback.has_value()) return margins;
  // [groups, N]: sums over the features of a group.
  Matrix sums = Matrix::Zero(q.groups, n);
  for (Eigen::Index k = 0; k < n; ++k) {
    if (evidence.Dead(k)) continue;
    const int32_t group = q.group_of[static_cast<size_t>(evidence.Feature(k))];
    for (Eigen::Index j = k + 1; j < n; ++j) {
      const double value = evidence.feedback->inverse_u(k, j);
      sums(group, j) += evidence.nearest() ? 0.5 * std::abs(value) : value * value;
    }
  }
  Matrix steps(q.rows, q.groups);
  for (int64_t at = 0; at < q.rows * q.groups; ++at) {
    const auto step = static_cast<double>(q.scale[static_cast<size_t>(at)]);
    steps.data()[at] = evidence.nearest() ? step : step * step;
  }
  margins = steps * sums;
  if (evidence.nearest()) return margins;
  const double weights = static_cast<double>(q.rows) * static_cast<double>(n);
  const double likely = 0.5 * std::log(2 * weights * evidence.trials() /
                                       evidence.spec().certificate().failure_probability());
  return (likely * margins).cwiseSqrt();
}

// The levels that leave no target outside: integers L..H with L <= low + 1/2 and H >= high - 1/2 in
// steps (nearest; unbiased rounding stays between levels: without the halves), where zero points
// are integers and free; a symmetric grid has as many below zero as at and above, or, mirrored,
// above zero as at and below. `shift`, relative to the extremes, makes room for (or takes off) what
// rounding may have done.
double LevelsNeeded(const Evidence& evidence, double shift) {
  const Quantized& q = evidence.layer.q;
  const Matrix margins = Margins(evidence);
  const double beyond = evidence.nearest() ? 0.5 : 0;
  double most = 2;
  Vector low(q.groups);
  Vector high(q.groups);
  for (Eigen::Index r = 0; r < q.rows; ++r) {
    low.setZero();
    high.setZero();
    for (Eigen::Index i = 0; i < evidence.e.cols(); ++i) {
      const double from = evidence.feedback.has_value()
                              ? evidence.feedback->unrounded(r, i)
                              : evidence.layer.live_w(r, evidence.Feature(i));
      const int32_t group = q.group_of[static_cast<size_t>(evidence.Feature(i))];
      low[group] = std::min(low[group], (from - margins(r, i)) / evidence.Step(r, i));
      high[group] = std::max(high[group], (from + margins(r, i)) / evidence.Step(r, i));
    }
    for (int64_t g = 0; g < q.groups; ++g) {
      // No bits would give such a group another level than 0.
      if (q.vanishes[static_cast<size_t>(r * q.groups + g)] != 0) continue;
      const double bottom = low[g] + beyond - shift * std::abs(low[g]);
      const double top = high[g] - beyond + shift * std::abs(high[g]);
      const bool mirrored = 2 * q.zero[static_cast<size_t>(r * q.groups + g)] < q.top;
      const double longer = mirrored ? std::max(top, 1 - bottom) : std::max(-bottom, top + 1);
      const double levels =
          evidence.spec().symmetric() ? 2 * longer : std::ceil(top) - std::floor(bottom) + 1;
      most = std::max(most, levels);
    }
  }
  return most;
}

void CheckBits(const Evidence& evidence, VerificationReport& report) {
  const v1::Certificate& c = evidence.certificate;
  // Without feedback the extremes are weights, known exactly; half a step of the largest absmax
  // weight, or a weight on the outermost level, is then a tie, which the rounding of scales to
  // float32 (6e-8 of up to 2^bits steps) may tip: it counts as inside.
  const bool feedback = evidence.feedback.has_value();
  const double inward = feedback ? evidence.tolerance() : 1e-6;
  const double outward = feedback ? evidence.tolerance() : 0;
  const double least = LevelsNeeded(evidence, -inward);
  const double most = LevelsNeeded(evidence, outward);
  const double low = std::max(1.0, std::ceil(std::log2(least) - 1e-6));
  const double high = std::max(1.0, std::ceil(std::log2(most) - 1e-6));
  if (!c.has_bits_needed()) {
    report.Claim("bits_needed", high > 31, absl::StrCat("unset  (recomputed ", high, ")"));
    return;
  }
  report.Count("bits_needed", c.bits_needed(), static_cast<int64_t>(low),
               static_cast<int64_t>(high));
}

}  // namespace

void CheckRequiredBits(const Evidence& evidence, VerificationReport& report) {
  const v1::Certificate& c = evidence.certificate;
  const Clipping clipping = CountClipped(evidence);
  report.Count("clipped_weights", c.clipped_weights(), clipping.weights_low, clipping.weights_high);
  report.Count("clipped_rows", c.clipped_rows(), clipping.rows_low, clipping.rows_high);
  const double tolerance = evidence.tolerance();
  report.Number(
      "worst_overshoot", c.worst_overshoot(), clipping.overshoot.high,
      {clipping.overshoot.low * (1 - tolerance), clipping.overshoot.high * (1 + tolerance)});
  CheckBits(evidence, report);
}

}  // namespace certiq::verify
