#include "engine/quantize_layer.h"

#include <algorithm>
#include <exception>
#include <new>
#include <optional>
#include <string>
#include <utility>

#include "absl/strings/str_cat.h"
#include "base/status.h"
#include "base/status_macros.h"
#include "base/stopwatch.h"
#include "engine/certify/certify.h"
#include "engine/damping/damping_search.h"
#include "engine/gram/form_rounding.h"
#include "engine/gram/quadratic_form.h"
#include "engine/kernels/simd.h"
#include "engine/linalg/feedback_columns.h"
#include "engine/methods/refine.h"
#include "engine/methods/rtn.h"
#include "engine/methods/run_method.h"
#include "engine/scales/scale_objective.h"

namespace certiq::engine {
namespace {

// Qronos' customary damping, alpha of arXiv 2505.11695.
constexpr double kQronosSigma = 1e-6;

// Below so many tokens a live feature the certificate warns. On inputs without correlation, where
// error feedback has nothing to gain, it then costs 7 % on new tokens; of 15 real layers plain
// rounding was better for matched inputs up to one token a feature, and than Qronos still at 2.5
// (THEORY.md, V4).
constexpr int64_t kTokensPerFeature = 4;

// An explicit grid is read without further checks.
absl::Status CheckGrid(const LayerProblem& problem) {
  const ExplicitGrid* const grid = problem.spec.grid.get();
  if (grid == nullptr) return absl::OkStatus();
  const auto scales =
      static_cast<size_t>(problem.weights.rows() * problem.spec.Groups(problem.weights.features()));
  if (grid->scales.size() == scales &&
      (problem.spec.symmetric || grid->zero_points.size() == scales)) {
    return absl::OkStatus();
  }
  return absl::InvalidArgumentError("the explicit grid does not suit the size of the layer");
}

absl::Status CheckProblem(const LayerProblem& problem) {
  if (problem.weights.rows() < 1 || problem.weights.features() < 1) {
    return base::InvalidField(
        "weight.shape",
        absl::StrCat("expected at least one row and one feature, got [", problem.weights.rows(),
                     ", ", problem.weights.features(), "]"));
  }
  if (problem.statistics->features() != problem.weights.features()) {
    return base::InvalidField("x.shape", absl::StrCat("expected ", problem.weights.features(),
                                                      " features as the weights have, got ",
                                                      problem.statistics->features()));
  }
  if (problem.statistics->tokens < 1) {
    return base::PreconditionError("TOKENS", "x", "there are no calibration tokens to fit");
  }
  if (problem.statistics->tokens < problem.spec.min_tokens) {
    return base::PreconditionError(
        "TOKENS", "spec.min_tokens",
        absl::StrCat("the spec asks for ", problem.spec.min_tokens, " tokens to fit, there are ",
                     problem.statistics->tokens));
  }
  const bool held_out = problem.held_out != nullptr && problem.held_out->tokens > 0;
  if (problem.spec.NeedsHeldOut() && problem.spec.method != Method::kNearest && !held_out) {
    return base::PreconditionError(
        "HELD_OUT", "spec.damping.held_out",
        "no tokens were held out, and damping by held-out error needs some: "
        "set held_out_fraction");
  }
  return CheckGrid(problem);
}

// Features that are zero in all tokens, those held out included.
std::vector<bool> DeadFeatures(const LayerProblem& problem) {
  std::vector<bool> dead(static_cast<size_t>(problem.weights.features()));
  for (int64_t j = 0; j < problem.weights.features(); ++j) {
    dead[static_cast<size_t>(j)] =
        problem.statistics->gram.at(j, j) == 0 &&
        (problem.held_out == nullptr || problem.held_out->gram.at(j, j) == 0);
  }
  return dead;
}

// (V3) Qronos without damping in the spec.
void DecideDamping(const LayerProblem& problem, ResolvedSpec& spec, LayerCertificate& certificate) {
  if (spec.damping_rule.has_value()) return;
  if (problem.held_out != nullptr && problem.held_out->tokens > 0) {
    spec.damping_rule = DampingRule::kHeldOut;
    certificate.warnings.push_back(
        "no damping was given: Qronos chose lambda by the error on the held-out tokens");
    return;
  }
  spec.damping_rule = DampingRule::kRelativeSigmaMax;
  spec.damping_value = kQronosSigma;
  certificate.warnings.push_back(
      "no damping was given and no tokens were held out: Qronos used lambda = 1e-6 sigma_max, "
      "which fits the calibration tokens and may be worse than plain rounding on others; set "
      "held_out_fraction, or a larger damping");
}

// (V4) What the calibration tokens cannot tell. REQUIRES: the layer is certified.
void WarnOfUnseenTokens(const ResolvedSpec& spec, LayerCertificate& certificate) {
  if (spec.method == Method::kNearest || certificate.outcome != Outcome::kQuantized) return;
  constexpr char kRemedies[] = "a larger lambda, or METHOD_NEAREST";
  const int64_t live = certificate.features - certificate.dead_features;
  if (certificate.tokens < kTokensPerFeature * live) {
    certificate.warnings.push_back(absl::StrCat(
        "few tokens: ", certificate.tokens, " for ", live, " features, fewer than ",
        kTokensPerFeature, " each: on tokens that it was not fitted to the result may be worse ",
        "than plain rounding; what helps: more calibration tokens, damping by held-out tokens ",
        "(spec.damping.held_out), ", kRemedies));
  }
  const std::optional<double>& error = certificate.held_out_relative_error;
  const std::optional<double>& nearest = certificate.held_out_nearest_relative_error;
  if (error.has_value() && nearest.has_value() && *error > *nearest) {
    certificate.warnings.push_back(absl::StrCat(
        "worse than plain rounding on the held-out tokens: relative error ", *error,
        ", of plain rounding ", *nearest, "; what helps: more calibration tokens, ", kRemedies));
  }
}

// Codes and groups back in the original order of features.
void RestoreOrder(const std::vector<int64_t>& order, Executor& executor, Grid& grid,
                  UnsetVector<uint8_t>& codes) {
  if (order.empty()) return;
  const auto features = static_cast<int64_t>(order.size());
  executor.ParallelFor(grid.rows, [&](int64_t r) {
    std::vector<uint8_t> row(order.size());
    uint8_t* worked = codes.data() + r * features;
    // Locals: a byte that is written may be part of anything else.
    uint8_t* restored = row.data();
    const int64_t* place = order.data();
    for (int64_t i = 0; i < features; ++i) restored[place[i]] = worked[i];
    std::copy(row.begin(), row.end(), worked);
  });
  std::vector<int32_t> group_of(order.size());
  for (size_t i = 0; i < order.size(); ++i) {
    group_of[static_cast<size_t>(order[i])] = grid.group_of[i];
  }
  grid.group_of = std::move(group_of);
}

// What W itself gives, before the method takes it.
absl::Status CertifyReference(const RunContext& context, const WorkingLayer& layer,
                              LayerCertificate& certificate) {
  const base::Stopwatch watch(certificate.seconds.reference);
  context.Report(Phase::kReference, 0);
  ASSIGN_OR_RETURN(
      std::vector<double> energies,
      ReferenceEnergies(layer.statistics(), layer.reference, Phase::kReference, context));
  // |X w|^2 is the error of a layer without weights.
  ASSIGN_OR_RETURN(const FormRounding rounding,
                   SettleErrors(layer.statistics(), layer.reference, layer.reference,
                                Phase::kReference, context, energies));
  certificate.reference_energy = Sum(energies);
  certificate.reference_energy_rounding = Sum(rounding.sums);
  return absl::OkStatus();
}

absl::Status CompareNearest(const ResolvedSpec& spec, const WorkingLayer& layer,
                            const RoundedLayer& rounded, const RunContext& context,
                            LayerCertificate& certificate) {
  const base::Stopwatch watch(certificate.seconds.reference);
  ResolvedSpec nearest = spec;
  nearest.rounding = Rounding::kNearest;
  RoundedLayer plain;
  plain.grid = rounded.grid;
  RoundAlone(nearest, layer, std::vector<double>(layer.dead.size()), nullptr, context, plain);
  ASSIGN_OR_RETURN(std::vector<double> errors,
                   SquaredErrors(layer.statistics(), layer.reference, plain.change,
                                 layer.initial_error(), Phase::kReference, context));
  RETURN_IF_ERROR(SettleErrors(layer.statistics(), layer.reference, plain.change, Phase::kReference,
                               context, errors)
                      .status());
  certificate.nearest_relative_error = RelativeError(Sum(errors), certificate.reference_energy);
  return absl::OkStatus();
}

absl::StatusOr<QuantizedLayer> Quantize(LayerProblem problem, const RunContext& context) {
  RETURN_IF_ERROR(CheckProblem(problem));
  QuantizedLayer result;
  LayerCertificate& certificate = result.certificate;
  ResolvedSpec spec = problem.spec;
  RETURN_IF_ERROR(CheckRange(spec, problem.weights, DeadFeatures(problem)));
  DecideDamping(problem, spec, certificate);
  certificate.held_out_tokens = problem.held_out != nullptr ? problem.held_out->tokens : 0;

  DampingRule rule = *spec.damping_rule;
  double value = spec.damping_value;
  bool with_held_out = false;
  if (rule == DampingRule::kHeldOut && spec.method != Method::kNearest) {
    ASSIGN_OR_RETURN(value, ChooseDamping(problem, spec, context, certificate));
    // The final run uses all tokens with the ratio found.
    problem.statistics = std::make_shared<const Statistics>(
        Sum(*problem.statistics, *problem.held_out, *context.executor));
    problem.held_out.reset();
    with_held_out = true;
    rule = DampingRule::kRelativeTrace;
  }

  certificate.rows = problem.weights.rows();
  certificate.features = problem.weights.features();
  certificate.tokens = problem.statistics->tokens;
  certificate.spec = spec;
  WorkingLayer layer =
      MakeWorkingLayer(spec, std::move(problem.statistics), std::move(problem.weights), context);
  layer.factors = problem.factors;
  layer.with_held_out = with_held_out;
  if (std::find(layer.dead.begin(), layer.dead.end(), false) == layer.dead.end()) {
    return base::PreconditionError("ACTIVATIONS", "x",
                                   "all calibration activations are zero: there is nothing to fit");
  }
  double lambda = 0;
  if (spec.method != Method::kNearest) {
    const base::Stopwatch watch(certificate.seconds.factor);
    ASSIGN_OR_RETURN(lambda, LambdaOf(rule, value, layer.statistics().gram, context));
  }
  RETURN_IF_ERROR(CertifyReference(context, layer, certificate));
  std::optional<HeldOutSet> held;
  if (problem.held_out != nullptr && problem.held_out->tokens > 0) {
    const base::Stopwatch watch(certificate.seconds.certify);
    ASSIGN_OR_RETURN(held, MakeHeldOutSet(problem.held_out, layer, context));
    if (spec.method != Method::kNearest) {
      ASSIGN_OR_RETURN(certificate.held_out_nearest_relative_error,
                       HeldOutNearestError(*held, layer, spec, context));
    }
  }
  ASSIGN_OR_RETURN(RoundedLayer rounded,
                   RunMethod(spec, layer, lambda,
                             {.consume_factor = true, .consume_weights = !spec.compare_nearest},
                             context, certificate.seconds));
  certificate.factor_flops += FactorFlops(rounded, certificate.features);
  if (rounded.damping->factor.has_value()) {
    certificate.round_flops += SweepFlops(spec, rounded, certificate.rows, certificate.features);
  }

  if (spec.compare_nearest) {
    RETURN_IF_ERROR(CompareNearest(spec, layer, rounded, context, certificate));
  }
  {
    const base::Stopwatch watch(certificate.seconds.certify);
    context.Report(Phase::kCertify, 0);
    RETURN_IF_ERROR(Certify(spec, layer, rounded, context, certificate));
    if (held.has_value()) {
      ASSIGN_OR_RETURN(certificate.held_out_relative_error,
                       HeldOutError(*held, layer, rounded.change, context));
      certificate.held_out_rows = certificate.rows;
    }
  }
  RETURN_IF_ERROR(CheckFinite(spec, certificate));
  WarnOfUnseenTokens(spec, certificate);
  if (context.cancelled()) return context.CancellationStatus();

  // Pack. What is no longer needed makes room first.
  context.Report(Phase::kPack, 0);
  rounded.damping.reset();
  rounded.change = StripMatrix();
  const std::vector<int64_t> order = std::move(layer.order);
  layer = WorkingLayer();
  RestoreOrder(order, *context.executor, rounded.grid, rounded.codes);
  TurnMirrored(spec, *context.executor, rounded.grid, rounded.codes);
  {
    const base::Stopwatch watch(certificate.seconds.pack);
    result.tensors =
        PackResult(spec, rounded.grid, rounded.codes, certificate.features, *context.executor);
  }
  certificate.bits_per_weight = BitsPerWeight(spec, rounded.grid, certificate.features);
  context.Report(Phase::kPack, 1);
  return result;
}

}  // namespace

absl::StatusOr<QuantizedLayer> QuantizeLayer(LayerProblem problem, const RunContext& context) {
  // Eigen and the standard library throw std::bad_alloc; nothing else is
  // expected, and nothing may cross this border.
  try {
    const std::string calibration = problem.calibration;
    absl::StatusOr<QuantizedLayer> layer = Quantize(std::move(problem), context);
    const std::optional<base::Precondition> missing = base::PreconditionOf(layer.status());
    if (!calibration.empty() && missing.has_value() && missing->type == kImpossibleSums) {
      return base::PreconditionError(
          missing->type, missing->subject,
          absl::StrCat("calibration ", calibration, ": ", layer.status().message()));
    }
    return layer;
  } catch (const std::bad_alloc&) {
    return absl::ResourceExhaustedError("memory ran out while quantizing the layer");
  } catch (const std::exception& error) {
    return absl::InternalError(absl::StrCat("the engine failed: ", error.what()));
  }
}

int64_t PeakBytes(const ResolvedSpec& spec, int64_t rows, int64_t features, bool mismatched,
                  bool held_out) {
  const int64_t groups = spec.Groups(features);
  const int64_t triangle = UpperTriangle<double>::ElementsFor(features) * 8;
  const int64_t sums = mismatched ? 2 * triangle + features * features * 8 : triangle;
  const int64_t weights = StripMatrix::BytesFor(rows, features);
  const int64_t wide = BasicStripMatrix<double>::BytesFor(rows, features);
  const int64_t codes = rows * features;
  const int64_t grid = rows * groups * 9;
  // Sums (again in another order, and once more while damping is searched for), factor and its
  // float32 columns.
  const int64_t copies =
      (spec.order == Order::kNatural ? 1 : 2) + (spec.NeedsHeldOut() ? 1 : 0) + (held_out ? 1 : 0);
  // W, and with dead features W without them; in another order both for a moment.
  const bool new_scales = spec.group_scales == GroupScales::kDynamic || spec.scale_trials > 1;
  // Refinement keeps W and what it found while the sweep measures that.
  const int64_t weight_copies = 2 + (spec.order == Order::kNatural ? 0 : 1) +
                                (spec.compare_nearest ? 1 : 0) + (new_scales ? 1 : 0) +
                                (spec.polish > 0 ? 1 : 0);
  const int64_t refining =
      spec.polish > 0 ? RefineBytes(features) + 2 * codes + grid + (mismatched ? wide : 0) : 0;
  const int64_t rounding = copies * sums + triangle + FeedbackColumns::BytesFor(features) +
                           weight_copies * weights + (mismatched ? (held_out ? 5 : 3) * wide : 0) +
                           codes + grid + groups * features * 8 + refining +
                           ScaleObjectiveTerms::BytesFor(spec, rows, features, mismatched);
  const int64_t packing = codes + 2 * grid + rows * features * 8 + features * 8;
  // Columns of U that wait while factoring (four panels), a packed panel of a quadratic form, rows
  // whose errors are evaluated in float64, per-row results, and small change.
  return std::max(rounding, packing) + features * kPanelRows * 64 + rows * 192 + (1 << 20);
}

const char* EngineIsa() { return kIsa; }
const char* EngineVersion() { return CERTIQ_VERSION; }

}  // namespace certiq::engine
