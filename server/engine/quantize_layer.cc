#include "engine/quantize_layer.h"

#include <algorithm>
#include <chrono>
#include <cmath>
#include <exception>
#include <new>
#include <optional>
#include <utility>

#include "absl/strings/str_cat.h"
#include "engine/nearest.h"
#include "engine/optq.h"
#include "engine/quadratic_form.h"
#include "engine/simd.h"
#include "engine/status.h"

namespace certiq::engine {
namespace {

// Rows on which the identity (M3) is recomputed in float64.
constexpr int64_t kIdentityRows = 32;
// Where the undamped error is less than this share of the damped one, the
// difference of the two loses digits and the quadratic form is computed instead.
constexpr double kCancellation = 0.1;
// An identity residual above this is said in a warning.
constexpr double kHealthyResidual = 1e-3;

// Adds the seconds of its scope to `to`.
class Stopwatch {
 public:
  explicit Stopwatch(double& to) : to_(to), start_(std::chrono::steady_clock::now()) {}
  ~Stopwatch() {
    to_ += std::chrono::duration<double>(std::chrono::steady_clock::now() - start_).count();
  }
  Stopwatch(const Stopwatch&) = delete;
  Stopwatch& operator=(const Stopwatch&) = delete;

 private:
  double& to_;
  std::chrono::steady_clock::time_point start_;
};

double Sum(const std::vector<double>& values) {
  double sum = 0;
  for (const double v : values) sum += v;
  return sum;
}

double RelativeError(double squared_error, double reference_energy) {
  if (squared_error == 0) return 0;
  return std::sqrt(squared_error / reference_energy);
}

// (D3) features whose activations are all zero.
std::vector<bool> DeadFeatures(const Statistics& statistics) {
  std::vector<bool> dead(static_cast<size_t>(statistics.features()));
  for (int64_t j = 0; j < statistics.features(); ++j) dead[j] = statistics.gram.at(j, j) == 0;
  return dead;
}

void ZeroFeatures(const std::vector<bool>& dead, StripMatrix& weights) {
  const int64_t width = StripMatrix::StripRows();
  for (int64_t s = 0; s < weights.strips(); ++s) {
    for (int64_t j = 0; j < weights.features(); ++j) {
      if (dead[j]) std::fill_n(weights.strip(s) + j * width, width, 0.0f);
    }
  }
}

std::vector<int64_t> EvenlySpaced(int64_t count, int64_t rows) {
  const int64_t chosen = std::min(count, rows);
  std::vector<int64_t> result(static_cast<size_t>(chosen));
  for (int64_t i = 0; i < chosen; ++i) result[i] = i * rows / chosen;
  return result;
}

absl::Status CheckSizes(const LayerProblem& problem) {
  if (problem.weights.rows() < 1 || problem.weights.features() < 1) {
    return InvalidField(
        "weight.shape",
        absl::StrCat("expected at least one row and one feature, got [", problem.weights.rows(),
                     ", ", problem.weights.features(), "]"));
  }
  if (problem.statistics.features() != problem.weights.features()) {
    return InvalidField("x.shape", absl::StrCat("expected ", problem.weights.features(),
                                                " features as the weights have, got ",
                                                problem.statistics.features()));
  }
  return absl::OkStatus();
}

// Errors and bounds of every row from what the sweep left, (M3) and (B1).
// `change` holds W - Q.
absl::Status CertifyErrors(const Statistics& statistics, double lambda, const Rounded& rounded,
                           const StripMatrix& change, const RunContext& context,
                           LayerCertificate& certificate) {
  const int64_t rows = change.rows();
  certificate.damped_squared_error = Sum(rounded.damped);
  certificate.l2_bound = std::sqrt(Sum(rounded.bound));
  if (!std::isfinite(certificate.damped_squared_error) || !std::isfinite(certificate.l2_bound)) {
    return InvalidField("weight",
                        "the weights are so large that rounding left the range of float32");
  }

  // (M3) on a sample, left side from the statistics.
  const std::vector<int64_t> sample = EvenlySpaced(kIdentityRows, rows);
  const std::vector<double> exact = ExactQuadraticForms(statistics.gram, change, sample, context);
  for (size_t i = 0; i < sample.size(); ++i) {
    const auto r = static_cast<size_t>(sample[i]);
    const double left = exact[i] + lambda * rounded.change[r];
    const double right = rounded.damped[r];
    if (left == 0 && right == 0) continue;
    certificate.identity_residual =
        std::max(certificate.identity_residual, std::abs(left / right - 1));
  }
  const bool healthy = certificate.identity_residual <= kHealthyResidual;
  if (!healthy) {
    certificate.warnings.push_back(
        absl::StrCat("identity_residual ", certificate.identity_residual,
                     " is large: errors were taken from the statistics; consider a larger lambda"));
  }

  const double undamped = certificate.damped_squared_error - lambda * Sum(rounded.change);
  std::vector<double> errors(static_cast<size_t>(rows));
  if (healthy && undamped > kCancellation * certificate.damped_squared_error) {
    for (size_t r = 0; r < errors.size(); ++r) {
      errors[r] = std::max(0.0, rounded.damped[r] - lambda * rounded.change[r]);
    }
  } else {
    absl::StatusOr<std::vector<double>> forms =
        QuadraticForms(statistics.gram, change, Phase::kCertify, context);
    if (!forms.ok()) return forms.status();
    errors = *std::move(forms);
  }
  certificate.squared_error = Sum(errors);

  for (size_t r = 0; r < errors.size(); ++r) {
    certificate.row_error.push_back(std::sqrt(errors[r]));
    certificate.row_bound.push_back(std::sqrt(rounded.bound[r]));
    certificate.clipped_weights += rounded.clipped[r];
    certificate.clipped_rows += rounded.clipped[r] > 0 ? 1 : 0;
  }
  certificate.worst_overshoot = rounded.worst_overshoot;
  return absl::OkStatus();
}

// C2, C_inf over live features.
void CertifyFactor(const Factor& factor, const std::vector<bool>& dead,
                   LayerCertificate& certificate) {
  double sum = 0;
  double largest = 0;
  int64_t live = 0;
  for (size_t j = 0; j < dead.size(); ++j) {
    if (dead[j]) continue;
    ++live;
    sum += factor.d[j];
    largest = std::max(largest, factor.d[j]);
  }
  certificate.dead_features = static_cast<int64_t>(dead.size()) - live;
  certificate.c2 = std::sqrt(sum / static_cast<double>(live));
  certificate.c_inf = std::sqrt(largest);
  certificate.condition_estimate = factor.condition;
}

absl::StatusOr<QuantizedLayer> Quantize(LayerProblem problem, const RunContext& context) {
  if (absl::Status status = CheckSizes(problem); !status.ok()) return status;
  const ResolvedSpec& spec = problem.spec;
  StripMatrix& weights = problem.weights;
  const int64_t features = weights.features();

  QuantizedLayer layer;
  LayerCertificate& certificate = layer.certificate;
  certificate.rows = weights.rows();
  certificate.features = features;
  certificate.tokens = problem.statistics.tokens;
  certificate.spec = spec;

  const std::vector<bool> dead = DeadFeatures(problem.statistics);
  if (std::all_of(dead.begin(), dead.end(), [](bool d) { return d; })) {
    return PreconditionError("ACTIVATIONS", "x",
                             "all calibration activations are zero: there is nothing to fit");
  }

  // Factor.
  std::optional<Factor> factor;
  {
    const Stopwatch watch(certificate.seconds.factor);
    context.Report(Phase::kFactor, 0);
    absl::StatusOr<DampedFactor> damped =
        FactorWithDamping(spec, problem.statistics, dead, context);
    if (!damped.ok()) return damped.status();
    certificate.lambda_requested = damped->lambda_requested;
    certificate.lambda_used = damped->lambda_used;
    certificate.damping_attempts = damped->attempts;
    const double n = static_cast<double>(features);
    certificate.factor_flops = static_cast<double>(damped->attempts.size()) * n * n * n / 3;
    if (!damped->factor.has_value()) {
      return PreconditionError(
          "DAMPING", "spec.damping",
          absl::StrCat("H = X^T X + lambda I could not be factored in ", spec.max_attempts,
                       " attempts (", DescribeAttempts(damped->attempts),
                       "); raise spec.damping or spec.damping.max_attempts"));
    }
    factor = std::move(damped->factor);
  }

  // The energy of the reference, while W is still there. Dead features add nothing to it.
  {
    const Stopwatch watch(certificate.seconds.reference);
    context.Report(Phase::kReference, 0);
    absl::StatusOr<std::vector<double>> energy =
        QuadraticForms(problem.statistics.gram, weights, Phase::kReference, context);
    if (!energy.ok()) return energy.status();
    certificate.reference_energy = Sum(*energy);
  }
  ZeroFeatures(dead, weights);
  absl::StatusOr<Grid> grid = AbsmaxGrid(spec, weights, context);
  if (!grid.ok()) return grid.status();
  if (spec.compare_nearest) {
    const Stopwatch watch(certificate.seconds.reference);
    const StripMatrix change = NearestChange(spec, *grid, weights, context);
    absl::StatusOr<std::vector<double>> errors =
        QuadraticForms(problem.statistics.gram, change, Phase::kReference, context);
    if (!errors.ok()) return errors.status();
    certificate.nearest_relative_error = RelativeError(Sum(*errors), certificate.reference_energy);
  }

  // Round.
  Rounded rounded;
  {
    const Stopwatch watch(certificate.seconds.round);
    context.Report(Phase::kRound, 0);
    absl::StatusOr<Rounded> swept = Optq(spec, *factor, dead, *grid, weights, context);
    if (!swept.ok()) return swept.status();
    rounded = *std::move(swept);
    const double n = static_cast<double>(features);
    certificate.round_flops = static_cast<double>(weights.rows()) * n * n;
  }

  // Certify; from here on `weights` is W - Q.
  {
    const Stopwatch watch(certificate.seconds.certify);
    context.Report(Phase::kCertify, 0);
    CertifyFactor(*factor, dead, certificate);
    if (absl::Status status = CertifyErrors(problem.statistics, certificate.lambda_used, rounded,
                                            weights, context, certificate);
        !status.ok()) {
      return status;
    }
    certificate.relative_error =
        RelativeError(certificate.squared_error, certificate.reference_energy);
  }
  if (context.cancelled()) return context.CancellationStatus();

  // Pack. What is no longer needed makes room first.
  {
    const Stopwatch watch(certificate.seconds.pack);
    context.Report(Phase::kPack, 0);
    factor.reset();
    problem.statistics = Statistics();
    problem.weights = StripMatrix();
    layer.tensors = PackDense(spec, *grid, rounded.codes, features);
    certificate.bits_per_weight = BitsPerWeight(spec, *grid, features);
    context.Report(Phase::kPack, 1);
  }
  return layer;
}

}  // namespace

absl::StatusOr<QuantizedLayer> QuantizeLayer(LayerProblem problem, const RunContext& context) {
  // Eigen and the standard library throw std::bad_alloc; nothing else is
  // expected, and nothing may cross this border.
  try {
    return Quantize(std::move(problem), context);
  } catch (const std::bad_alloc&) {
    return absl::ResourceExhaustedError("memory ran out while quantizing the layer");
  } catch (const std::exception& error) {
    return absl::InternalError(absl::StrCat("the engine failed: ", error.what()));
  }
}

int64_t PeakBytes(const ResolvedSpec& spec, int64_t rows, int64_t features) {
  const int64_t groups = spec.Groups(features);
  const int64_t triangle = UpperPanels<double>::ElementsFor(features) * 8;
  const int64_t weights = StripMatrix::BytesFor(rows, features);
  const int64_t codes = rows * features;
  const int64_t grid = rows * groups * 8;
  const int64_t rounding = triangle + triangle + FeedbackColumns::BytesFor(features) + weights +
                           codes + grid + (spec.compare_nearest ? weights : 0);
  const int64_t packing = codes + grid + rows * features * 4 + rows * groups * 8 + features * 4;
  // A panel of the quadratic form, per-row results, and small change.
  return std::max(rounding, packing) + features * kPanelRows * 4 + rows * 64 + (1 << 20);
}

const char* EngineIsa() { return kIsa; }
const char* EngineVersion() { return CERTIQ_VERSION; }

}  // namespace certiq::engine
