#include "engine/methods/run_method.h"

#include <algorithm>
#include <cmath>
#include <utility>

#include "absl/strings/str_cat.h"
#include "base/status.h"
#include "base/stopwatch.h"
#include "engine/certify/required_bits.h"
#include "engine/damping/failed_attempts.h"
#include "engine/gram/feature_order.h"
#include "engine/linalg/quadratic_form.h"
#include "engine/linalg/sigma_max.h"
#include "engine/methods/optq.h"
#include "engine/methods/qronos.h"
#include "engine/methods/refine.h"
#include "engine/methods/rtn.h"
#include "engine/scales/scale_objective.h"

namespace certiq::engine {
namespace {

void ZeroFeatures(const std::vector<bool>& dead, StripMatrix& weights) {
  const int64_t width = StripMatrix::StripRows();
  for (int64_t s = 0; s < weights.strips(); ++s) {
    for (int64_t j = 0; j < weights.features(); ++j) {
      if (dead[j]) std::fill_n(weights.strip(s) + j * width, width, 0.0f);
    }
  }
}

absl::Status DampingFailure(const std::vector<DampingAttempt>& attempts) {
  absl::Status status = base::PreconditionError(
      "DAMPING", "spec.damping",
      absl::StrCat("H = X^T X + lambda I could not be factored in ", attempts.size(), " attempts (",
                   DescribeAttempts(attempts),
                   "); raise spec.damping or spec.damping.max_attempts"));
  std::vector<StabilityCause> causes;
  causes.reserve(attempts.size());
  for (const DampingAttempt& attempt : attempts) causes.push_back(attempt.cause);
  AttachFailedAttempts(causes, status);
  return status;
}

// NEAREST with its bound (B2): min(sum_j eps_j |X~_j|, sqrt(sum_j eps_j^2) sigma_max(X~)), plus
// |(X - X~) w| where inputs are mismatched.
absl::StatusOr<MethodOutput> Nearest(const MethodInput& input, const Grid& grid,
                                     const RunContext& context) {
  const UpperPanels<double>& gram = input.statistics.gram;
  std::vector<double> norms(static_cast<size_t>(gram.size()));
  for (int64_t j = 0; j < gram.size(); ++j) norms[j] = std::sqrt(gram.at(j, j));
  NearestRounded rounded =
      RoundAlone(input.spec, input.order, grid, norms, input.weights, input.codes, context);
  const absl::StatusOr<double> sigma = LargestEigenvalueBound(gram, context);
  if (!sigma.ok()) return sigma.status();
  if (!std::isfinite(*sigma))
    return base::InvalidField("x", "expected activations whose sums are finite");
  auto errors = SquaredErrors(input.statistics, input.reference, rounded.change, input.initial,
                              Phase::kRound, context);
  if (!errors.ok()) return errors.status();

  MethodOutput output;
  output.damped = *std::move(errors);
  if (input.statistics.mismatch.has_value()) {
    output.initial = Roots(input.initial->squares);
  }
  for (size_t r = 0; r < output.damped.size(); ++r) {
    const double bound = std::min(rounded.reach[r], std::sqrt(rounded.width[r] * *sigma));
    // The statistics' own rounding, where a bound is attained.
    output.bound.push_back((1 + 1e-6) * (bound + (output.initial.empty() ? 0 : output.initial[r])));
  }
  output.codes = std::move(rounded.codes);
  output.change = std::move(rounded.change);
  output.clipped = std::move(rounded.clipped);
  output.worst_overshoot = rounded.worst_overshoot;
  if (input.certified) {
    output.bits_needed = BitsNeeded(input.spec, grid, {}, input.weights, context);
  }
  return output;
}

}  // namespace

WorkingLayer MakeWorkingLayer(const ResolvedSpec& spec, SharedStatistics sums, StripMatrix weights,
                              const RunContext& context) {
  WorkingLayer layer;
  layer.order = FeatureOrder(spec.order, *sums);
  layer.sums =
      layer.order.empty()
          ? std::move(sums)
          : std::make_shared<const Statistics>(Permute(*sums, layer.order, *context.executor));
  layer.reference = layer.order.empty() ? std::move(weights)
                                        : PermuteColumns(weights, layer.order, *context.executor);
  layer.dead.resize(static_cast<size_t>(layer.statistics().features()));
  for (size_t j = 0; j < layer.dead.size(); ++j) {
    const auto at = static_cast<int64_t>(j);
    layer.dead[j] = layer.statistics().gram.at(at, at) == 0;
  }
  if (std::find(layer.dead.begin(), layer.dead.end(), true) != layer.dead.end()) {
    layer.zeroed = layer.reference;
    ZeroFeatures(layer.dead, layer.zeroed);
  }
  return layer;
}

namespace {

// A factor of this fit alone, or one that others may use too.
struct FitFactor {
  SharedFactor shared;
  // The same; null where others may use it.
  std::shared_ptr<DampedFactor> own;
};

// From the cache where there is one. `made` counts what was factored here.
absl::StatusOr<FitFactor> FactorOf(const ResolvedSpec& spec, const WorkingLayer& layer,
                                   double lambda, FitUse use, const RunContext& context,
                                   int64_t& made) {
  const FactorUse factor_use = use.certified ? FactorUse::kCertify : FactorUse::kJudge;
  const auto make = [&]() -> absl::StatusOr<DampedFactor> {
    absl::StatusOr<DampedFactor> damped =
        FactorWithDamping(spec, lambda, layer.statistics().gram, layer.dead, factor_use, context);
    if (damped.ok()) made += static_cast<int64_t>(damped->attempts.size());
    return damped;
  };
  FitFactor factor;
  if (layer.factors != nullptr) {
    absl::StatusOr<SharedFactor> shared = layer.factors->Get({.order = spec.order,
                                                              .with_held_out = layer.with_held_out,
                                                              .lambda = lambda,
                                                              .use = factor_use,
                                                              .max_attempts = spec.max_attempts,
                                                              .growth = spec.damping_factor},
                                                             make);
    if (!shared.ok()) return shared.status();
    factor.shared = *std::move(shared);
    return factor;
  }
  absl::StatusOr<DampedFactor> damped = make();
  if (!damped.ok()) return damped.status();
  factor.own = std::make_shared<DampedFactor>(*std::move(damped));
  factor.shared = factor.own;
  return factor;
}

// Computes layer.initial where the method, or polish, needs it and it is not there. Fails only by
// cancellation.
absl::Status NeedInitialError(const ResolvedSpec& spec, Method method, const RunContext& context,
                              WorkingLayer& layer) {
  if (!layer.statistics().mismatch.has_value() || layer.initial.has_value()) {
    return absl::OkStatus();
  }
  if (method == Method::kQronos && spec.polish == 0 &&
      !QronosNeedsInitialError(layer.reference.rows(), layer.reference.features())) {
    return absl::OkStatus();
  }
  absl::StatusOr<InitialError> initial = ComputeInitialError(
      layer.statistics(), Widen(layer.reference, *context.executor), Phase::kRound, context);
  if (!initial.ok()) return initial.status();
  layer.initial = *std::move(initial);
  return absl::OkStatus();
}

absl::StatusOr<MethodOutput> RunMethod(const MethodInput& input, Fit& fit,
                                       const RunContext& context) {
  absl::StatusOr<MethodOutput> output = [&]() -> absl::StatusOr<MethodOutput> {
    if (!fit.damping->factor.has_value()) return Nearest(input, fit.grid, context);
    const Factor& factor = *fit.damping->factor;
    if (input.spec.method == Method::kOptq) {
      return Optq(input, factor, fit.damping->lambda_used, fit.grid, context);
    }
    return Qronos(input, factor, fit.damping->lambda_used, fit.grid, context);
  }();
  if (!output.ok()) return output;
  // Dynamic steps are new.
  if (absl::Status status = CheckScales(input.spec, fit.grid); !status.ok()) return status;
  for (const double damped : output->damped) {
    if (std::isfinite(damped)) continue;
    return base::InvalidField("weight",
                              "the weights are so large that rounding left the range of float32");
  }
  return output;
}

// Row r of both to another's.
void CopyRow(int64_t r, const Grid& from_grid, const UnsetVector<uint8_t>& from, Grid& grid,
             UnsetVector<uint8_t>& codes) {
  const auto features = static_cast<int64_t>(grid.group_of.size());
  std::copy_n(from.data() + r * features, features, codes.data() + r * features);
  std::copy_n(from_grid.scale.data() + r * grid.groups, grid.groups,
              grid.scale.data() + r * grid.groups);
}

// The method, then (S6) and (S7), then the method's measures of what came of it: e_j, bounds and
// errors are those of the final codes. A row whose error would have risen, in rounding, keeps the
// method's own.
absl::StatusOr<MethodOutput> RunPolished(MethodInput input, Fit& fit, const RunContext& context) {
  const bool certified = input.certified;
  input.certified = false;
  absl::StatusOr<MethodOutput> plain = RunMethod(input, fit, context);
  if (!plain.ok()) return plain;
  plain->change = StripMatrix();
  const Grid plain_grid = fit.grid;
  UnsetVector<uint8_t> codes = plain->codes;
  const absl::StatusOr<int32_t> passes =
      Polish(input, fit.damping->lambda_used, fit.grid, codes, context);
  if (!passes.ok()) return passes.status();
  PolishOutcome& outcome = fit.polish.emplace();
  outcome.passes = *passes;
  for (const double damped : plain->damped) outcome.damped_before += damped;

  input.codes = &codes;
  input.certified = certified;
  absl::StatusOr<MethodOutput> polished = RunMethod(input, fit, context);
  if (!polished.ok()) return polished;
  bool risen = false;
  for (size_t r = 0; r < plain->damped.size(); ++r) {
    if (polished->damped[r] <= plain->damped[r]) continue;
    CopyRow(static_cast<int64_t>(r), plain_grid, plain->codes, fit.grid, codes);
    risen = true;
  }
  if (!risen) return polished;
  polished = absl::StatusOr<MethodOutput>();
  return RunMethod(input, fit, context);
}

}  // namespace

absl::StatusOr<Fit> RunFit(const ResolvedSpec& spec, WorkingLayer& layer, double lambda, FitUse use,
                           const RunContext& context, EngineSeconds& seconds) {
  Fit fit;
  std::shared_ptr<DampedFactor> own;
  if (spec.method != Method::kNearest) {
    const base::Stopwatch watch(seconds.factor);
    context.Report(Phase::kFactor, 0);
    if (!std::isfinite(lambda)) {
      return base::InvalidField(
          "spec.damping",
          absl::StrCat("expected a finite lambda, got ", lambda, " from activations of this size"));
    }
    absl::StatusOr<FitFactor> damped =
        FactorOf(spec, layer, lambda, use, context, fit.factorisations);
    if (!damped.ok()) return damped.status();
    fit.damping = std::move(damped->shared);
    own = std::move(damped->own);
  }
  const bool factored = fit.damping->factor.has_value();
  if (spec.method != Method::kNearest && !factored) {
    if (spec.on_failure == OnFailure::kFail) {
      return DampingFailure(fit.damping->attempts);
    }
    fit.outcome = Outcome::kFellBackToNearest;
  }

  const base::Stopwatch watch(seconds.round);
  context.Report(Phase::kRound, 0);
  const Method method = factored ? spec.method : Method::kNearest;
  if (absl::Status status = NeedInitialError(spec, method, context, layer); !status.ok()) {
    return status;
  }
  const StripMatrix& weights = layer.weights();
  fit.grid = MakeGrid(spec, weights.rows(), weights.features(), layer.order);
  const bool dynamic = factored && spec.group_scales == GroupScales::kDynamic;
  // The sweep finds the others; Qronos needs the first before it starts.
  const int64_t searched = dynamic ? 1 : fit.grid.groups;
  std::optional<StepObjective> objective;
  if (HasMetric(spec.scale) && spec.grid == nullptr) {
    absl::StatusOr<StepObjective> made =
        StepObjective::Make(spec, layer, *fit.damping, fit.grid, context);
    if (!made.ok()) return made.status();
    objective = *std::move(made);
  }
  const StepRules rules = objective.has_value() ? objective->Rules(searched) : StepRules();
  FillSteps(spec, weights, context, fit.grid, rules);
  if (context.cancelled()) return context.CancellationStatus();
  if (absl::Status status = CheckScales(spec, fit.grid); !status.ok()) return status;
  if (objective.has_value()) {
    absl::Status improved = objective->Improve(spec, searched, weights, context, fit.grid);
    if (!improved.ok()) return improved;
    // Its memory is for the sweep.
    if (!dynamic) objective.reset();
  }
  MethodInput input{spec,
                    layer.statistics(),
                    layer.dead,
                    layer.order,
                    layer.reference,
                    weights,
                    layer.initial.has_value() ? &*layer.initial : nullptr,
                    seconds,
                    use.certified};
  // Qronos corrects W first; the error feedback starts from there, and (S5) is about that.
  if (dynamic || spec.scale == ScaleRule::kCompensated) input.steps = &rules;
  if (spec.polish > 0 && fit.outcome == Outcome::kQuantized) {
    absl::StatusOr<MethodOutput> output = RunPolished(input, fit, context);
    if (!output.ok()) return output.status();
    fit.output = *std::move(output);
    return fit;
  }
  if (use.consume_factor && own != nullptr && factored) input.spare_factor = &*own->factor;
  if (use.consume_weights && layer.zeroed.rows() > 0) {
    input.spare_weights = &layer.zeroed;
  }
  input.spare_initial = use.consume_weights;
  if (input.spare_weights == nullptr && use.consume_weights &&
      !layer.statistics().mismatch.has_value()) {
    input.spare_weights = &layer.reference;
  }
  absl::StatusOr<MethodOutput> output = RunMethod(input, fit, context);
  if (!output.ok()) return output.status();
  fit.output = *std::move(output);
  return fit;
}

}  // namespace certiq::engine
