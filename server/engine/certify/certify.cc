#include "engine/certify/certify.h"

#include <algorithm>
#include <cmath>

#include "absl/strings/str_cat.h"
#include "engine/linalg/quadratic_form.h"
#include "engine/methods/sweep_method.h"

namespace certiq::engine {
namespace {

// Rows on which the identity (M3) is recomputed in float64.
constexpr int64_t kIdentityRows = 32;
// Where the undamped error is less than this share of the damped one, the
// difference of the two loses digits and the error is computed from the sums instead.
constexpr double kCancellation = 0.1;
// An identity residual above this is said in a warning.
constexpr double kHealthyResidual = 1e-3;

// (M3), (M7) on a sample, the left side from the sums.
absl::StatusOr<double> IdentityResidual(const WorkingLayer& layer, const Fit& fit,
                                        const std::vector<double>& norms,
                                        const RunContext& context) {
  const std::vector<int64_t> sample = EvenlySpaced(kIdentityRows, fit.output.change.rows());
  // W counts only where inputs are mismatched; elsewhere it may be gone.
  const StripMatrix change = SelectRows(fit.output.change, sample);
  const StripMatrix weights =
      layer.statistics().mismatch.has_value() ? SelectRows(layer.reference, sample) : StripMatrix();
  const auto squares =
      ExactSquaredErrors(layer.statistics(), Widen(weights, *context.executor),
                         Widen(change, *context.executor), nullptr, Phase::kCertify, context);
  if (!squares.ok()) return squares.status();
  const std::vector<double>& exact = *squares;
  double residual = 0;
  for (size_t i = 0; i < sample.size(); ++i) {
    const auto r = static_cast<size_t>(sample[i]);
    const double left = exact[i] + fit.damping->lambda_used * norms[r];
    const double right = fit.output.damped[r];
    if (left == 0 && right == 0) continue;
    residual = std::max(residual, std::abs(left / right - 1));
  }
  return residual;
}

// Undamped squared error of every row.
absl::StatusOr<std::vector<double>> UndampedErrors(const WorkingLayer& layer, const Fit& fit,
                                                   const RunContext& context,
                                                   LayerCertificate& certificate) {
  if (!fit.damping->factor.has_value()) return fit.output.damped;
  const std::vector<double> norms = RowNorms(fit.output.change, *context.executor);
  const absl::StatusOr<double> residual = IdentityResidual(layer, fit, norms, context);
  if (!residual.ok()) return residual.status();
  certificate.identity_residual = *residual;
  const bool healthy = certificate.identity_residual <= kHealthyResidual;
  if (!healthy) {
    certificate.warnings.push_back(absl::StrCat(
        "identity_residual ", certificate.identity_residual,
        " is large: errors were taken from the sums of the activations; a larger lambda helps"));
  }
  std::vector<double> errors = fit.output.damped;
  for (size_t r = 0; r < errors.size(); ++r) {
    errors[r] = std::max(0.0, errors[r] - fit.damping->lambda_used * norms[r]);
  }
  if (healthy && Sum(errors) > kCancellation * Sum(fit.output.damped)) return errors;
  return SquaredErrors(layer.statistics(), layer.reference, fit.output.change, nullptr,
                       Phase::kCertify, context);
}

// C2, C_inf, condition, (P2) over live features.
void CertifyFactor(const WorkingLayer& layer, const Factor& factor, LayerCertificate& certificate) {
  double sum = 0;
  double log_sum = 0;
  double largest = 0;
  int64_t live = 0;
  for (size_t j = 0; j < layer.dead.size(); ++j) {
    if (layer.dead[j]) continue;
    ++live;
    sum += factor.d[j];
    log_sum += std::log2(factor.d[j]);
    largest = std::max(largest, factor.d[j]);
  }
  const double mean = sum / static_cast<double>(live);
  certificate.c2 = std::sqrt(mean);
  certificate.c_inf = std::sqrt(largest);
  certificate.condition_estimate = factor.condition;
  certificate.rate_gap_bits =
      std::max(0.0, 0.5 * (std::log2(mean) - log_sum / static_cast<double>(live)));
}

// (P1) errors uniform in a cell of delta (nearest) or, given the target, two-valued with mean zero
// (stochastic: delta^2 / 6 on average), plus what was there before rounding. Without feedback
// |X~_j|^2 stands for D_j.
double PredictedError(const ResolvedSpec& spec, const WorkingLayer& layer, const Fit& fit) {
  std::vector<double> weight(static_cast<size_t>(fit.grid.groups));
  for (size_t j = 0; j < layer.dead.size(); ++j) {
    if (layer.dead[j]) continue;
    const auto at = static_cast<int64_t>(j);
    weight[static_cast<size_t>(fit.grid.group_of[j])] += fit.damping->factor.has_value()
                                                             ? fit.damping->factor->d[j]
                                                             : layer.statistics().gram.at(at, at);
  }
  double sum = 0;
  for (size_t at = 0; at < fit.grid.scale.size(); ++at) {
    const double step = fit.grid.scale[at];
    sum += step * step * weight[at % weight.size()];
  }
  sum /= spec.rounding == Rounding::kNearest ? 12 : 6;
  for (const double initial : fit.output.initial) sum += initial * initial;
  return sum;
}

// The largest output error of any token: bounded by the row's norm, always; with stochastic
// rounding also by (B5) with probability 1 - eps over the m R tokens and rows.
void CertifyLargest(const ResolvedSpec& spec, const Fit& fit, LayerCertificate& certificate) {
  double always = 0;
  for (const double bound : fit.output.bound) always = std::max(always, bound);
  certificate.linf_bound = always;
  certificate.linf_probability = 1;
  if (fit.output.widest.empty()) return;
  const double pairs =
      static_cast<double>(certificate.tokens) * static_cast<double>(certificate.rows);
  // Each row keeps one of its trials, whichever: the bound holds for all of them at once.
  const double deviations =
      std::sqrt(0.5 * std::log(2 * pairs * spec.scale_trials / spec.failure_probability));
  double likely = 0;
  for (size_t r = 0; r < fit.output.widest.size(); ++r) {
    likely = std::max(likely, deviations * std::sqrt(fit.output.widest[r]) +
                                  fit.output.clipped_reach[r] +
                                  (fit.output.initial.empty() ? 0 : fit.output.initial[r]));
  }
  certificate.linf_bound = std::min(always, likely);
  certificate.linf_probability = 1 - spec.failure_probability;
}

}  // namespace

std::vector<int64_t> EvenlySpaced(int64_t count, int64_t rows) {
  const int64_t chosen = std::min(count, rows);
  std::vector<int64_t> result(static_cast<size_t>(chosen));
  for (int64_t i = 0; i < chosen; ++i) result[static_cast<size_t>(i)] = i * rows / chosen;
  return result;
}

double Sum(const std::vector<double>& values) {
  double sum = 0;
  for (const double v : values) sum += v;
  return sum;
}

double RelativeError(double squared_error, double energy) {
  if (squared_error == 0) return 0;
  return std::sqrt(squared_error / energy);
}

absl::Status Certify(const ResolvedSpec& spec, const WorkingLayer& layer, const Fit& fit,
                     const RunContext& context, LayerCertificate& certificate) {
  certificate.outcome = fit.outcome;
  certificate.lambda_requested = fit.damping->lambda_requested;
  certificate.lambda_used = fit.damping->factor.has_value() ? fit.damping->lambda_used : 0;
  certificate.damping_attempts = fit.damping->attempts;
  certificate.dead_features = std::count(layer.dead.begin(), layer.dead.end(), true);
  if (fit.damping->factor.has_value()) CertifyFactor(layer, *fit.damping->factor, certificate);

  const absl::StatusOr<std::vector<double>> errors =
      UndampedErrors(layer, fit, context, certificate);
  if (!errors.ok()) return errors.status();
  certificate.squared_error = Sum(*errors);
  certificate.damped_squared_error = Sum(fit.output.damped);
  certificate.polish = fit.polish;
  certificate.relative_error =
      RelativeError(certificate.squared_error, certificate.reference_energy);
  double bound = 0;
  for (size_t r = 0; r < errors->size(); ++r) {
    certificate.row_error.push_back(std::sqrt((*errors)[r]));
    bound += fit.output.bound[r] * fit.output.bound[r];
    certificate.clipped_weights += fit.output.clipped[r];
    certificate.clipped_rows += fit.output.clipped[r] > 0 ? 1 : 0;
  }
  certificate.row_bound = fit.output.bound;
  certificate.l2_bound = std::sqrt(bound);
  certificate.worst_overshoot = fit.output.worst_overshoot;
  certificate.bits_needed = fit.output.bits_needed;
  certificate.predicted_squared_error = PredictedError(spec, layer, fit);
  CertifyLargest(spec, fit, certificate);
  if (fit.output.terms.has_value()) {
    certificate.optq_initial = std::sqrt(fit.output.terms->optq);
    if (spec.method == Method::kQronos) {
      certificate.qronos_initial = std::sqrt(fit.output.terms->qronos);
      certificate.floor = std::sqrt(fit.output.terms->floor);
    }
  }
  return absl::OkStatus();
}

}  // namespace certiq::engine
