#include "engine/certify/certify.h"

#include <algorithm>
#include <cmath>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "base/status_macros.h"
#include "engine/gram/quadratic_form.h"

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
absl::StatusOr<double> IdentityResidual(const WorkingLayer& layer, const RoundedLayer& rounded,
                                        const std::vector<double>& norms,
                                        const RunContext& context) {
  const std::vector<int64_t> sample = EvenlySpaced(kIdentityRows, rounded.change.rows());
  // W counts only where inputs are mismatched; elsewhere it may be gone.
  const StripMatrix change = SelectRows(rounded.change, sample);
  const StripMatrix weights =
      layer.mismatched() ? SelectRows(layer.reference, sample) : StripMatrix();
  ASSIGN_OR_RETURN(
      const std::vector<double> exact,
      ExactSquaredErrors(layer.statistics(), Widen(weights, *context.executor),
                         Widen(change, *context.executor), nullptr, Phase::kCertify, context));
  double residual = 0;
  for (size_t i = 0; i < sample.size(); ++i) {
    const auto r = static_cast<size_t>(sample[i]);
    const double left = exact[i] + rounded.damping->lambda_used * norms[r];
    const double right = rounded.damped[r];
    if (left == 0 && right == 0) continue;
    residual = std::max(residual, std::abs(left / right - 1));
  }
  return residual;
}

// Undamped squared error of every row.
absl::StatusOr<std::vector<double>> UndampedErrors(const WorkingLayer& layer,
                                                   const RoundedLayer& rounded,
                                                   const RunContext& context,
                                                   LayerCertificate& certificate) {
  if (!rounded.damping->factor.has_value()) return rounded.damped;
  const std::vector<double> norms = RowNorms(rounded.change, *context.executor);
  ASSIGN_OR_RETURN(certificate.identity_residual, IdentityResidual(layer, rounded, norms, context));
  const bool healthy = certificate.identity_residual <= kHealthyResidual;
  if (!healthy) {
    certificate.warnings.push_back(absl::StrCat(
        "identity_residual ", certificate.identity_residual,
        " is large: errors were taken from the sums of the activations; a larger lambda helps"));
  }
  std::vector<double> errors = rounded.damped;
  for (size_t r = 0; r < errors.size(); ++r) {
    errors[r] = std::max(0.0, errors[r] - rounded.damping->lambda_used * norms[r]);
  }
  if (healthy && Sum(errors) > kCancellation * Sum(rounded.damped)) return errors;
  return SquaredErrors(layer.statistics(), layer.reference, rounded.change, nullptr,
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
double PredictedError(const ResolvedSpec& spec, const WorkingLayer& layer,
                      const RoundedLayer& rounded) {
  std::vector<double> weight(static_cast<size_t>(rounded.grid.groups));
  for (size_t j = 0; j < layer.dead.size(); ++j) {
    if (layer.dead[j]) continue;
    const auto at = static_cast<int64_t>(j);
    weight[static_cast<size_t>(rounded.grid.group_of[j])] +=
        rounded.damping->factor.has_value() ? rounded.damping->factor->d[j]
                                            : layer.statistics().gram.at(at, at);
  }
  double sum = 0;
  for (size_t at = 0; at < rounded.grid.scale.size(); ++at) {
    const double step = rounded.grid.scale[at];
    sum += step * step * weight[at % weight.size()];
  }
  sum /= spec.rounding == Rounding::kNearest ? 12 : 6;
  for (const double initial : rounded.initial) sum += initial * initial;
  return sum;
}

// The largest output error of any token: bounded by the row's norm, always; with stochastic
// rounding also by (B5) with probability 1 - eps over the m R tokens and rows.
void CertifyLargest(const ResolvedSpec& spec, const RoundedLayer& rounded,
                    LayerCertificate& certificate) {
  double always = 0;
  for (const double bound : rounded.bound) always = std::max(always, bound);
  certificate.linf_bound = always;
  certificate.linf_probability = 1;
  if (rounded.widest.empty()) return;
  const double pairs =
      static_cast<double>(certificate.tokens) * static_cast<double>(certificate.rows);
  // Each row keeps one of its trials, whichever: the bound holds for all of them at once.
  const double deviations =
      std::sqrt(0.5 * std::log(2 * pairs * spec.scale_trials / spec.failure_probability));
  double likely = 0;
  for (size_t r = 0; r < rounded.widest.size(); ++r) {
    likely = std::max(likely, deviations * std::sqrt(rounded.widest[r]) + rounded.clipped_reach[r] +
                                  (rounded.initial.empty() ? 0 : rounded.initial[r]));
  }
  certificate.linf_bound = std::min(always, likely);
  certificate.linf_probability = 1 - spec.failure_probability;
}

// Counts the groups that vanish, and says so in a warning.
void CertifyUnderflow(const ResolvedSpec& spec, const Grid& grid, LayerCertificate& certificate) {
  Underflow underflow;
  for (int64_t r = 0; r < grid.rows; ++r) {
    const auto first = grid.vanishes.begin() + r * grid.groups;
    const int64_t groups = std::count(first, first + grid.groups, 1);
    if (groups == 0) continue;
    underflow.groups += groups;
    if (underflow.rows++ < Underflow::kNamed) underflow.first_rows.push_back(r);
  }
  if (underflow.groups == 0) return;
  const bool half_levels = spec.LevelType() != DType::kF32;
  const bool more = underflow.rows > Underflow::kNamed;
  certificate.warnings.push_back(absl::StrCat(
      "the weights of ", underflow.groups, " of ", grid.scale.size(), " scales are too small for ",
      Name(spec.scale_dtype),
      half_levels ? absl::StrCat(" or levels of ", Name(spec.LevelType())) : "",
      " and became zeros, in ", underflow.rows, underflow.rows == 1 ? " row: " : " rows: ",
      absl::StrJoin(underflow.first_rows, ", "), more ? " ..." : ""));
  certificate.underflow = std::move(underflow);
}

}  // namespace

absl::Status Certify(const ResolvedSpec& spec, const WorkingLayer& layer,
                     const RoundedLayer& rounded, const RunContext& context,
                     LayerCertificate& certificate) {
  certificate.outcome = rounded.outcome;
  certificate.lambda_requested = rounded.damping->lambda_requested;
  certificate.lambda_used = rounded.damping->factor.has_value() ? rounded.damping->lambda_used : 0;
  certificate.damping_attempts = rounded.damping->attempts;
  certificate.dead_features = std::count(layer.dead.begin(), layer.dead.end(), true);
  if (rounded.damping->factor.has_value())
    CertifyFactor(layer, *rounded.damping->factor, certificate);

  ASSIGN_OR_RETURN(const std::vector<double> errors,
                   UndampedErrors(layer, rounded, context, certificate));
  certificate.squared_error = Sum(errors);
  certificate.damped_squared_error = Sum(rounded.damped);
  certificate.polish = rounded.refinement;
  certificate.relative_error =
      RelativeError(certificate.squared_error, certificate.reference_energy);
  double bound = 0;
  for (size_t r = 0; r < errors.size(); ++r) {
    certificate.row_error.push_back(std::sqrt(errors[r]));
    bound += rounded.bound[r] * rounded.bound[r];
    certificate.clipped_weights += rounded.clipped[r];
    certificate.clipped_rows += rounded.clipped[r] > 0 ? 1 : 0;
  }
  certificate.row_bound = rounded.bound;
  certificate.l2_bound = std::sqrt(bound);
  certificate.worst_overshoot = rounded.worst_overshoot;
  certificate.bits_needed = rounded.bits_needed;
  CertifyUnderflow(spec, rounded.grid, certificate);
  certificate.predicted_squared_error = PredictedError(spec, layer, rounded);
  CertifyLargest(spec, rounded, certificate);
  if (rounded.terms.has_value()) {
    certificate.optq_initial = std::sqrt(rounded.terms->optq);
    if (spec.method == Method::kQronos) {
      certificate.qronos_initial = std::sqrt(rounded.terms->qronos);
      certificate.floor = std::sqrt(rounded.terms->floor);
    }
  }
  return absl::OkStatus();
}

}  // namespace certiq::engine
