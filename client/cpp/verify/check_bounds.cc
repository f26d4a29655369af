#include <algorithm>
#include <cmath>
#include <optional>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "checks.h"
#include "linear_algebra.h"

namespace certiq::verify {
namespace {

// A number, and the most that the service may make of it.
struct Bound {
  double value = 0;
  double high = 0;
};

// sqrt(sum_j eps_j^2 D_j), eps_j = max(delta_j / 2, |e_j|) (B1).
Bound Width(const Evidence& evidence, Eigen::Index r) {
  Bound sum;
  for (Eigen::Index i = 0; i < evidence.e.cols(); ++i) {
    const double eps = std::max(evidence.Step(r, i) / 2, std::abs(evidence.e(r, i)));
    const double wide = eps + kOutwardTarget * std::abs(evidence.Target(r, i));
    sum.value += eps * eps * evidence.d[i];
    sum.high += wide * wide * evidence.d[i];
  }
  return {std::sqrt(sum.value), std::sqrt(sum.high)};
}

// (B1), (B2), (B3): a bound for every row.
std::vector<Bound> RowBounds(const Evidence& evidence) {
  std::vector<Bound> bounds;
  const double sigma = evidence.feedback.has_value() ? 0 : LargestEigenvalue(evidence.layer.gram);
  for (Eigen::Index r = 0; r < evidence.e.rows(); ++r) {
    if (evidence.feedback.has_value()) {
      const double initial = std::sqrt(evidence.feedback->prior_initial[r]);
      const Bound width = Width(evidence, r);
      bounds.push_back({initial + width.value, (1 + kOutward) * (initial + width.high)});
      continue;
    }
    double reach = 0;
    double squares = 0;
    for (Eigen::Index i = 0; i < evidence.e.cols(); ++i) {
      if (evidence.Dead(i)) continue;
      const double eps = std::max(evidence.Step(r, i) / 2, std::abs(evidence.e(r, i)));
      reach += eps * std::sqrt(evidence.d[i]);
      squares += eps * eps;
    }
    const double initial = evidence.mismatched() ? std::sqrt(evidence.errors.residual[r]) : 0;
    const double spectral = std::sqrt(squares * sigma);
    bounds.push_back(
        {std::min(reach, spectral) + initial,
         (1 + kOutward) * (std::min(reach, (1 + kOutwardSigma) * spectral) + initial)});
  }
  // What the error itself, with its rounding, may raise a bound to. The service's own error may be
  // off by its rounding once more.
  const v1::Certificate& c = evidence.certificate;
  const Layer& layer = evidence.layer;
  const double lambda = evidence.feedback.has_value() ? c.lambda_used() : 0;
  const std::vector<Range> roundings = FormRoundings(evidence, /*energies=*/false);
  for (size_t r = 0; r < bounds.size(); ++r) {
    const auto row = static_cast<Eigen::Index>(r);
    const double change = (layer.live_w.row(row) - layer.q.levels.row(row)).squaredNorm();
    const bool told = r < static_cast<size_t>(c.row_rounding_size());
    const double rounding = told ? c.row_rounding(static_cast<int>(r)) : roundings[r].high;
    const double damped = evidence.errors.squared[row] + lambda * change;
    bounds[r].high = std::max(bounds[r].high, std::sqrt(damped + 2 * rounding));
  }
  return bounds;
}

// C2, C_inf, (P2): of the factor alone.
void CheckFactor(const Evidence& evidence, VerificationReport& report) {
  const v1::Certificate& c = evidence.certificate;
  if (!evidence.feedback.has_value()) {
    report.Claim("c2, c_inf", c.c2() == 0 && c.c_inf() == 0, "none without a factor");
    report.OptionalClose("rate_gap_bits", c.has_rate_gap_bits(), c.rate_gap_bits(), std::nullopt,
                         0);
    return;
  }
  double sum = 0;
  double logs = 0;
  double live = 0;
  for (Eigen::Index i = 0; i < evidence.d.size(); ++i) {
    if (evidence.Dead(i)) continue;
    sum += evidence.d[i];
    logs += std::log2(evidence.d[i]);
    ++live;
  }
  report.Close("c2", c.c2(), std::sqrt(sum / live), evidence.tolerance());
  report.Close("c_inf", c.c_inf(), std::sqrt(evidence.d.maxCoeff()), evidence.tolerance());
  const double gap = 0.5 * (std::log2(sum / live) - logs / live);
  if (!c.has_rate_gap_bits()) {
    report.Claim("rate_gap_bits", false, "missing");
    return;
  }
  // D_j off by 1e-6 (float32 sums), or by the slack, moves a logarithm by 1.44 times that.
  report.Number("rate_gap_bits", c.rate_gap_bits(), gap,
                Around(gap, kPromise, 1.5e-6 + 1.5 * evidence.feedback->slack));
}

// (P1): half-step uniform errors delta^2 / 12, stochastic ones delta^2 / 6, plus initial terms.
double Predicted(const Evidence& evidence) {
  double sum = 0;
  for (Eigen::Index r = 0; r < evidence.e.rows(); ++r) {
    for (Eigen::Index i = 0; i < evidence.e.cols(); ++i) {
      sum += evidence.Step(r, i) * evidence.Step(r, i) * evidence.d[i];
    }
  }
  sum /= evidence.nearest() ? 12 : 6;
  if (evidence.feedback.has_value()) return sum + evidence.feedback->initial.sum();
  return sum + (evidence.mismatched() ? evidence.errors.residual.sum() : 0);
}

// (B3), (M8). Set for methods with feedback: the first for Qronos, with zeros where inputs match;
// for OPTQ what it starts with, where inputs do not match.
void CheckInitialTerms(const Evidence& evidence, VerificationReport& report) {
  const v1::Certificate& c = evidence.certificate;
  const bool qronos =
      evidence.feedback.has_value() && evidence.spec().method() == v1::METHOD_QRONOS;
  std::optional<double> ours;
  std::optional<double> optq;
  std::optional<double> floor;
  if (qronos) {
    ours = std::sqrt(evidence.feedback->prior_initial.sum());
    floor = std::sqrt(evidence.feedback->floor.sum());
  }
  if (qronos || (evidence.feedback.has_value() && evidence.mismatched())) {
    optq = evidence.mismatched() ? std::sqrt(evidence.errors.residual.sum()) : 0;
  }
  report.OptionalClose("qronos_initial", c.has_qronos_initial(), c.qronos_initial(), ours,
                       evidence.tolerance());
  report.OptionalClose("optq_initial", c.has_optq_initial(), c.optq_initial(), optq, kPromise);
  report.OptionalClose("floor", c.has_floor(), c.floor(), floor, evidence.tolerance());
}

// (B5) over the tokens and rows of the fit; a target that lies within its slack of the outermost
// level may have counted as clipped or not: the least and the most that allows.
Range LikelyLargest(const Evidence& evidence) {
  const Quantized& q = evidence.layer.q;
  const double pairs =
      static_cast<double>(evidence.certificate.tokens()) * static_cast<double>(q.rows);
  const double deviations =
      std::sqrt(0.5 * std::log(2 * pairs * evidence.trials() /
                               evidence.spec().certificate().failure_probability()));
  Range most;
  for (Eigen::Index r = 0; r < evidence.e.rows(); ++r) {
    Range widest;
    Range reach;
    // Qronos' first feature is rounded before the sweep: its initial term has the actual q_1.
    const bool skip_first =
        evidence.feedback.has_value() && evidence.feedback->first_target.size() > 0;
    for (Eigen::Index i = 0; i < evidence.e.cols(); ++i) {
      const double root = std::sqrt(evidence.d[i]);
      const double step = evidence.Step(r, i);
      const double error = std::abs(evidence.e(r, i));
      const double position = evidence.Target(r, i) / step + q.zero[q.Cell(r, evidence.Feature(i))];
      const double beyond = std::max(-position, position - q.top);
      const double slack = evidence.ErrorSlack(r, i) / step + 1e-6 + 0x1p-22 * q.top;
      if (i == 0 && skip_first) {
        widest.high = std::max(widest.high, step * root);
        continue;
      }
      if (q.Vanishes(r, evidence.Feature(i))) {
        // Nothing is drawn there.
        reach.low += error * root;
        reach.high += error * root;
        continue;
      }
      if (beyond < slack) widest.high = std::max(widest.high, step * root);
      if (beyond < -slack) widest.low = std::max(widest.low, step * root);
      if (beyond > slack) reach.low += error * root;
      if (beyond > -slack) reach.high += error * root;
    }
    const double initial = std::sqrt(evidence.feedback->initial[r]);
    most.low = std::max(most.low, deviations * widest.low + reach.low + initial);
    most.high = std::max(most.high, deviations * widest.high + reach.high + initial);
  }
  return most;
}

void CheckLargest(const Evidence& evidence, const std::vector<Bound>& bounds,
                  VerificationReport& report) {
  const v1::Certificate& c = evidence.certificate;
  double always = 0;
  Range range;
  for (const Bound& bound : bounds) {
    always = std::max(always, bound.value);
    range.high = std::max(range.high, bound.high);
  }
  range = {always * (1 - evidence.tolerance()), range.high * (1 + evidence.tolerance())};
  double shown = always;
  bool certain = true;
  if (evidence.feedback.has_value() && !evidence.nearest()) {
    const Range likely = LikelyLargest(evidence);
    range.low = std::min(range.low, likely.low * (1 - evidence.tolerance()));
    range.high = std::min(range.high, likely.high * (1 + kOutward + evidence.tolerance()));
    certain = likely.low >= always;
    shown = std::min(always, likely.high);
  }
  if (!c.has_linf_bound() || !c.has_linf_probability()) {
    report.Claim("linf_bound, linf_probability", false, "missing");
    return;
  }
  report.Number("linf_bound", c.linf_bound(), shown, range);
  const double likely = 1 - evidence.spec().certificate().failure_probability();
  // A bound that always holds also holds with any probability.
  const bool stochastic = evidence.feedback.has_value() && !evidence.nearest();
  const bool said = (certain && c.linf_probability() == 1) ||
                    (stochastic && std::abs(c.linf_probability() - likely) <= 1e-12);
  report.Claim("linf_probability", said,
               absl::StrFormat("%.9g  (%s)", c.linf_probability(),
                               certain ? "the largest row_bound always holds" : "(B5)"));
  const double largest = evidence.errors.largest.maxCoeff();
  report.Claim(
      "the largest error of any token is within linf_bound", largest <= c.linf_bound() * (1 + 1e-6),
      absl::StrFormat(
          "%.6g of %.6g%s", largest, c.linf_bound(),
          c.linf_probability() < 1 ? ", which was only promised with linf_probability" : ""));
}

}  // namespace

void CheckBounds(const Evidence& evidence, VerificationReport& report) {
  const v1::Certificate& c = evidence.certificate;
  CheckFactor(evidence, report);
  const std::vector<Bound> bounds = RowBounds(evidence);
  Bound squares;
  std::vector<double> values;
  std::vector<Range> ranges;
  for (const Bound& bound : bounds) {
    squares.value += bound.value * bound.value;
    squares.high += bound.high * bound.high;
    values.push_back(bound.value);
    ranges.push_back(
        {bound.value * (1 - evidence.tolerance()), bound.high * (1 + evidence.tolerance())});
  }
  const double l2 = std::sqrt(squares.value);
  report.Number(
      "l2_bound", c.l2_bound(), l2,
      {l2 * (1 - evidence.tolerance()), std::sqrt(squares.high) * (1 + evidence.tolerance())});
  if (evidence.spec().certificate().per_row()) {
    report.Rows("row_bound", {c.row_bound().begin(), c.row_bound().end()}, values, ranges);
  } else {
    report.Count("row_bound", c.row_bound_size(), 0, 0);
  }
  report.OptionalClose("predicted_squared_error", c.has_predicted_squared_error(),
                       c.predicted_squared_error(), Predicted(evidence), evidence.tolerance());
  CheckInitialTerms(evidence, report);
  CheckLargest(evidence, bounds, report);

  // The claims themselves. Our own sums are off by 1e-12 or so.
  int64_t broken = 0;
  double tightest = 0;
  for (int r = 0; r < std::min(c.row_bound_size(), static_cast<int>(bounds.size())); ++r) {
    const double error = std::sqrt(evidence.errors.squared[r]);
    broken += error <= c.row_bound(r) * (1 + 1e-9) ? 0 : 1;
    if (c.row_bound(r) > 0) tightest = std::max(tightest, error / c.row_bound(r));
  }
  if (c.row_bound_size() > 0) {
    report.Claim("every row's error is within its row_bound", broken == 0,
                 broken == 0 ? absl::StrFormat("at most %.3g of it", tightest)
                             : absl::StrCat(broken, " rows pass theirs"));
  }
  const double total = std::sqrt(evidence.errors.squared.sum());
  report.Claim("the layer's error is within l2_bound", total <= c.l2_bound() * (1 + 1e-9),
               absl::StrFormat("%.6g of %.6g", total, c.l2_bound()));
}

}  // namespace certiq::verify
