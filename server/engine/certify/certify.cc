#include "engine/certify/certify.h"

#include <algorithm>
#include <cmath>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "base/status.h"
#include "base/status_macros.h"
#include "engine/gram/form_rounding.h"
#include "engine/gram/quadratic_form.h"

namespace certiq::engine {
namespace {

// Rows on which the identity (M3) is recomputed in float64.
constexpr int64_t kIdentityRows = 32;
// Where the undamped error is less than this share of the damped one, the
// difference of the two loses digits and the error is computed from the sums instead.
constexpr double kCancellation = 0.1;
// The same for a single row.
constexpr double kRowCancellation = 0.02;
// An identity residual above this is said in a warning.
constexpr double kHealthyResidual = 1e-3;
// Rows whose error, with its rounding, comes so near to the square of their bound are evaluated in
// float64, so that the bound is not passed by what float32 lost. With mismatched inputs that would
// take three times as long as the method, and forms are float64 already but for Qronos' identity.
constexpr double kNearBound = 0.99;

// What of a rounded layer the numbers are made of, row by row.
class RowErrors {
 public:
  RowErrors(const WorkingLayer& layer, const RoundedLayer& rounded, const RunContext& context)
      : layer_(layer),
        rounded_(rounded),
        context_(context),
        rounding_(RoundingOfForms(layer.statistics(), layer.reference, rounded.change,
                                  *context.executor)),
        norms_(RowNorms(rounded.change, *context.executor)),
        damped_(rounded.damped),
        bound_(rounded.bound) {}

  // Fills errors, and raises bounds that they, with their rounding, pass.
  absl::Status Evaluate(LayerCertificate& certificate) {
    bool exact = false;
    errors_ = damped_;
    bool from_sums = !factored();
    if (factored()) {
      ASSIGN_OR_RETURN(certificate.identity_residual, IdentityResidual());
      exact = certificate.identity_residual > kHealthyResidual;
      if (exact) {
        certificate.warnings.push_back(absl::StrCat(
            "identity_residual ", certificate.identity_residual,
            " is large: errors were taken from the sums of the activations; a larger lambda "
            "helps"));
      }
      for (size_t r = 0; r < errors_.size(); ++r) errors_[r] -= lambda() * norms_[r];
      if (!exact && Sum(errors_) <= kCancellation * Sum(damped_)) {
        from_sums = true;
        ASSIGN_OR_RETURN(
            errors_, SquaredErrors(layer_.statistics(), layer_.reference, rounded_.change, nullptr,
                                   Phase::kCertify, context_));
      }
    }
    const bool massive = HasMassiveTokens(layer_.statistics());
    std::vector<int64_t> rows;
    for (size_t r = 0; r < errors_.size(); ++r) {
      // The sweep is float32 too: next to massive tokens a small error is lost in it.
      const bool lost = ((from_sums || massive) && LostByFloat32(rounding_, r, errors_[r])) ||
                        (!from_sums && errors_[r] <= kRowCancellation * damped_[r]);
      const bool near = !layer_.mismatched() &&
                        damped_[r] + rounding_.sums[r] > kNearBound * bound_[r] * bound_[r];
      if (exact || lost || near) rows.push_back(static_cast<int64_t>(r));
    }
    RETURN_IF_ERROR(EvaluateRows(
        layer_.statistics(), layer_.reference,
        [this](const std::vector<int64_t>& some, Executor&) { return Change(some); }, rows,
        Phase::kCertify, context_, errors_));
    RETURN_IF_ERROR(LiftToRounding(rounding_, errors_));
    for (size_t r = 0; r < errors_.size(); ++r) {
      const double damped = errors_[r] + lambda() * norms_[r];
      if (exact || !factored()) damped_[r] = damped;
      bound_[r] = std::max(bound_[r], std::sqrt(damped + rounding_.sums[r]));
    }
    return absl::OkStatus();
  }

  // After Evaluate: undamped and damped squared errors, bounds (norms), and (R1) of the errors.
  const std::vector<double>& errors() const { return errors_; }
  const std::vector<double>& damped() const { return damped_; }
  const std::vector<double>& bound() const { return bound_; }
  const std::vector<double>& rounding() const { return rounding_.sums; }

 private:
  bool factored() const { return rounded_.damping->factor.has_value(); }
  double lambda() const { return factored() ? rounded_.damping->lambda_used : 0; }

  // W - Q of some rows, exact where W is still there; elsewhere the float32 difference.
  BasicStripMatrix<double> Change(const std::vector<int64_t>& rows) const {
    if (!layer_.KeepsReference())
      return Widen(SelectRows(rounded_.change, rows), *context_.executor);
    const int64_t n = rounded_.change.features();
    BasicStripMatrix<double> change(static_cast<int64_t>(rows.size()), n);
    std::vector<float> w(static_cast<size_t>(n));
    std::vector<double> d(w.size());
    for (size_t i = 0; i < rows.size(); ++i) {
      const int64_t r = rows[i];
      layer_.reference.GetRow(r, w.data());
      for (int64_t j = 0; j < n; ++j) {
        const auto at = static_cast<size_t>(j);
        const int32_t code = rounded_.codes[static_cast<size_t>(r * n + j)];
        const double level = rounded_.grid.Level(r, j, code);
        d[at] = layer_.dead[at] ? 0 : static_cast<double>(w[at]) - level;
      }
      change.SetRow(static_cast<int64_t>(i), d.data());
    }
    return change;
  }

  // (M3), (M7) on a sample, the left side from the sums.
  absl::StatusOr<double> IdentityResidual() const {
    const std::vector<int64_t> sample = EvenlySpaced(kIdentityRows, rounded_.change.rows());
    std::vector<double> exact(norms_.size());
    RETURN_IF_ERROR(EvaluateRows(
        layer_.statistics(), layer_.reference,
        [this](const std::vector<int64_t>& some, Executor&) { return Change(some); }, sample,
        Phase::kCertify, context_, exact));
    double residual = 0;
    for (const int64_t row : sample) {
      const auto r = static_cast<size_t>(row);
      const double left = exact[r] + lambda() * norms_[r];
      const double right = damped_[r];
      if (left == 0 && right == 0) continue;
      residual = std::max(residual, right == 0 ? 1 : std::abs(left / right - 1));
    }
    return residual;
  }

  const WorkingLayer& layer_;
  const RoundedLayer& rounded_;
  const RunContext& context_;
  FormRounding rounding_;
  std::vector<double> norms_;
  std::vector<double> errors_;
  std::vector<double> damped_;
  std::vector<double> bound_;
};

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
                    const std::vector<double>& bounds, LayerCertificate& certificate) {
  double always = 0;
  for (const double bound : bounds) always = std::max(always, bound);
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

  RowErrors rows(layer, rounded, context);
  RETURN_IF_ERROR(rows.Evaluate(certificate));
  certificate.squared_error = Sum(rows.errors());
  certificate.damped_squared_error = Sum(rows.damped());
  certificate.squared_error_rounding = Sum(rows.rounding());
  certificate.polish = rounded.refinement;
  certificate.relative_error =
      RelativeError(certificate.squared_error, certificate.reference_energy);
  double bound = 0;
  for (size_t r = 0; r < rows.errors().size(); ++r) {
    certificate.row_error.push_back(std::sqrt(rows.errors()[r]));
    bound += rows.bound()[r] * rows.bound()[r];
    certificate.clipped_weights += rounded.clipped[r];
    certificate.clipped_rows += rounded.clipped[r] > 0 ? 1 : 0;
  }
  certificate.row_bound = rows.bound();
  certificate.row_rounding = rows.rounding();
  certificate.l2_bound = std::sqrt(bound);
  certificate.worst_overshoot = rounded.worst_overshoot;
  certificate.bits_needed = rounded.bits_needed;
  CertifyUnderflow(spec, rounded.grid, certificate);
  certificate.predicted_squared_error = PredictedError(spec, layer, rounded);
  CertifyLargest(spec, rounded, rows.bound(), certificate);
  if (rounded.terms.has_value()) {
    certificate.optq_initial = std::sqrt(rounded.terms->optq);
    if (spec.method == Method::kQronos) {
      certificate.qronos_initial = std::sqrt(rounded.terms->qronos);
      certificate.floor = std::sqrt(rounded.terms->floor);
    }
  }
  return absl::OkStatus();
}

absl::Status CheckFinite(const ResolvedSpec& spec, const LayerCertificate& certificate) {
  const LayerCertificate& c = certificate;
  std::vector<double> numbers = {c.lambda_requested,
                                 c.lambda_used,
                                 c.condition_estimate,
                                 c.squared_error,
                                 c.damped_squared_error,
                                 c.reference_energy,
                                 c.relative_error,
                                 c.l2_bound,
                                 c.identity_residual,
                                 c.c2,
                                 c.c_inf,
                                 c.squared_error_rounding,
                                 c.reference_energy_rounding,
                                 c.worst_overshoot,
                                 c.polish.has_value() ? c.polish->damped_before : 0};
  for (const std::optional<double>& number :
       {c.nearest_relative_error, c.predicted_squared_error, c.rate_gap_bits, c.linf_bound,
        c.held_out_relative_error, c.held_out_nearest_relative_error, c.qronos_initial,
        c.optq_initial, c.floor}) {
    numbers.push_back(number.value_or(0));
  }
  for (const DampingCandidate& candidate : c.damping_candidates) {
    numbers.push_back(candidate.lambda);
    numbers.push_back(candidate.held_out_relative_error);
  }
  for (const std::vector<double>* rows : {&c.row_error, &c.row_bound, &c.row_rounding}) {
    numbers.insert(numbers.end(), rows->begin(), rows->end());
  }
  if (std::all_of(numbers.begin(), numbers.end(), [](double v) { return std::isfinite(v); })) {
    return absl::OkStatus();
  }
  const bool lambda_alone =
      c.lambda_used > 0 && std::isfinite(c.squared_error) && std::isfinite(c.reference_energy);
  return TooLarge(spec, c.lambda_used, lambda_alone, /*row=*/-1);
}

}  // namespace certiq::engine
