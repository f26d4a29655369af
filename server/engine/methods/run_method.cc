#include "engine/methods/run_method.h"

#include <algorithm>
#include <cmath>
#include <memory>
#include <optional>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "base/status.h"
#include "base/status_macros.h"
#include "base/stopwatch.h"
#include "engine/gram/quadratic_form.h"
#include "engine/linalg/failed_attempts.h"
#include "engine/methods/optq.h"
#include "engine/methods/qronos.h"
#include "engine/methods/refine.h"
#include "engine/methods/rtn.h"
#include "engine/scales/scale_objective.h"

namespace certiq::engine {
namespace {

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

// Sets the factor of the run, from the cache where there is one, and counts what was factored
// here. `own` is the same factor where nobody else may use it, else null.
absl::Status FactorLayer(const ResolvedSpec& spec, const WorkingLayer& layer, double lambda,
                         RunUse use, const RunContext& context, RoundedLayer& result,
                         std::shared_ptr<DampedFactor>& own) {
  const FactorUse factor_use = use.certified ? FactorUse::kCertify : FactorUse::kJudge;
  const auto make = [&]() -> absl::StatusOr<DampedFactor> {
    absl::StatusOr<DampedFactor> damped =
        FactorWithDamping(spec, lambda, layer.statistics().gram, layer.dead, factor_use, context);
    if (damped.ok()) result.factorisations += static_cast<int64_t>(damped->attempts.size());
    return damped;
  };
  if (layer.factors != nullptr) {
    ASSIGN_OR_RETURN(result.damping, layer.factors->Get({.order = spec.order,
                                                         .with_held_out = layer.with_held_out,
                                                         .lambda = lambda,
                                                         .use = factor_use,
                                                         .max_attempts = spec.max_attempts,
                                                         .growth = spec.damping_factor},
                                                        make));
    return absl::OkStatus();
  }
  ASSIGN_OR_RETURN(DampedFactor damped, make());
  own = std::make_shared<DampedFactor>(std::move(damped));
  result.damping = own;
  return absl::OkStatus();
}

// Computes layer.initial where the method, or refinement, needs it and it is not there. Fails only
// by cancellation.
absl::Status NeedInitialError(const ResolvedSpec& spec, Method method, const RunContext& context,
                              WorkingLayer& layer) {
  if (!layer.mismatched() || layer.initial.has_value()) return absl::OkStatus();
  if (method == Method::kQronos && spec.polish == 0 &&
      !QronosNeedsInitialError(layer.reference.rows(), layer.reference.features())) {
    return absl::OkStatus();
  }
  ASSIGN_OR_RETURN(layer.initial, ComputeInitialError(layer.statistics(),
                                                      Widen(layer.reference, *context.executor),
                                                      Phase::kRound, context));
  return absl::OkStatus();
}

// Whether a row's codes stand for numbers: a half level type may be too narrow for a scale's
// levels, which sums of errors need not show.
bool LevelsAreFinite(const RoundedLayer& rounded, int64_t row) {
  const Grid& grid = rounded.grid;
  bool all = true;
  for (int64_t at = row * grid.groups; at < (row + 1) * grid.groups; ++at) {
    const int32_t zero = grid.zero[static_cast<size_t>(at)];
    const int32_t furthest = std::max(zero - grid.lowest_code, grid.highest_code - zero);
    const float level = grid.scale[static_cast<size_t>(at)] * static_cast<float>(furthest);
    all = all && std::isfinite(RoundTo(grid.level_type, level));
  }
  if (all) return true;
  const auto features = static_cast<int64_t>(grid.group_of.size());
  for (int64_t j = 0; j < features; ++j) {
    const int32_t code = rounded.codes[static_cast<size_t>(row * features + j)];
    if (!std::isfinite(grid.Level(row, j, code))) return false;
  }
  return true;
}

// The method itself: rounds the layer, or measures codes that are given.
absl::Status Round(const MethodInput& input, RoundedLayer& result, const RunContext& context) {
  result.codes = UnsetVector<uint8_t>();
  result.change = StripMatrix();
  result.worst_overshoot = 0;
  if (!result.damping->factor.has_value()) {
    RETURN_IF_ERROR(Nearest(input, result, context));
  } else if (input.spec.method == Method::kOptq) {
    RETURN_IF_ERROR(Optq(input, result, context));
  } else {
    RETURN_IF_ERROR(Qronos(input, result, context));
  }
  // Dynamic groups have new scales.
  RETURN_IF_ERROR(CheckScales(input.spec, result.grid, input.layer.row_names));
  for (size_t r = 0; r < result.damped.size(); ++r) {
    const auto row = static_cast<int64_t>(r);
    const bool finite = std::isfinite(result.damped[r]);
    if (finite && LevelsAreFinite(result, row)) continue;
    const double lambda = result.damping->lambda_used;
    const bool lambda_alone = !finite && LevelsAreFinite(result, row) &&
                              std::isfinite(RowNorms(result.change, *context.executor)[r]) &&
                              lambda > MeanDiagonal(input.layer.statistics().gram);
    return TooLarge(input.spec, lambda, lambda_alone, input.layer.RowName(row));
  }
  return absl::OkStatus();
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
absl::Status RoundAndRefine(MethodInput input, RoundedLayer& result, const RunContext& context) {
  const bool certified = input.certified;
  input.certified = false;
  RETURN_IF_ERROR(Round(input, result, context));
  const Grid plain_grid = result.grid;
  const UnsetVector<uint8_t> plain_codes = std::move(result.codes);
  const std::vector<double> plain_damped = result.damped;
  result.change = StripMatrix();
  UnsetVector<uint8_t> codes = plain_codes;
  RefineOutcome& outcome = result.refinement.emplace();
  ASSIGN_OR_RETURN(outcome.passes,
                   Refine(input, result.damping->lambda_used, result.grid, codes, context));
  for (const double damped : plain_damped) outcome.damped_before += damped;

  input.codes = &codes;
  input.certified = certified;
  RETURN_IF_ERROR(Round(input, result, context));
  bool risen = false;
  for (size_t r = 0; r < plain_damped.size(); ++r) {
    if (result.damped[r] <= plain_damped[r]) continue;
    CopyRow(static_cast<int64_t>(r), plain_grid, plain_codes, result.grid, codes);
    risen = true;
  }
  return risen ? Round(input, result, context) : absl::OkStatus();
}

}  // namespace

absl::StatusOr<RoundedLayer> RunMethod(const ResolvedSpec& spec, WorkingLayer& layer, double lambda,
                                       RunUse use, const RunContext& context,
                                       EngineSeconds& seconds) {
  RoundedLayer result;
  std::shared_ptr<DampedFactor> own;
  if (spec.method != Method::kNearest) {
    const base::Stopwatch watch(seconds.factor);
    context.Report(Phase::kFactor, 0);
    if (!std::isfinite(lambda)) {
      return base::InvalidField(
          DampingField(spec.damping_rule.value_or(DampingRule::kRelativeTrace)),
          absl::StrCat("expected a finite lambda, got ", lambda, " from activations of this size"));
    }
    RETURN_IF_ERROR(FactorLayer(spec, layer, lambda, use, context, result, own));
  }
  const bool factored = result.damping->factor.has_value();
  if (spec.method != Method::kNearest && !factored) {
    if (spec.on_failure == OnFailure::kFail) {
      return DampingFailure(result.damping->attempts);
    }
    result.outcome = Outcome::kFellBackToNearest;
  }

  const base::Stopwatch watch(seconds.round);
  context.Report(Phase::kRound, 0);
  const Method method = factored ? spec.method : Method::kNearest;
  RETURN_IF_ERROR(NeedInitialError(spec, method, context, layer));
  const StripMatrix& weights = layer.weights();
  result.grid = MakeGrid(spec, weights.rows(), weights.features(), layer.order);
  const bool dynamic = factored && spec.group_scales == GroupScales::kDynamic;
  // The sweep finds the others; Qronos needs the first before it starts.
  const int64_t searched = dynamic ? 1 : result.grid.groups;
  std::optional<ScaleObjectiveTerms> objective;
  if (HasMetric(spec.scale) && spec.grid == nullptr) {
    ASSIGN_OR_RETURN(objective,
                     ScaleObjectiveTerms::Make(spec, layer, *result.damping, result.grid, context));
  }
  const ScaleMetric metric = objective.has_value() ? objective->Metric(searched) : ScaleMetric();
  FillQuantParams(spec, weights, context, result.grid, metric);
  if (context.cancelled()) return context.CancellationStatus();
  RETURN_IF_ERROR(CheckScales(spec, result.grid, layer.row_names));
  if (objective.has_value()) {
    RETURN_IF_ERROR(objective->Improve(spec, searched, weights, context, result.grid));
    // Its memory is for the sweep.
    if (!dynamic) objective.reset();
  }
  MethodInput input{spec, layer, seconds, use.certified};
  // Qronos corrects W first; the error feedback starts from there, and (S5) is about that.
  if (dynamic || spec.scale == ScaleRule::kCompensated) input.metric = &metric;
  if (spec.polish > 0 && result.outcome == Outcome::kQuantized) {
    RETURN_IF_ERROR(RoundAndRefine(input, result, context));
    return result;
  }
  if (use.consume_factor && own != nullptr && factored) input.spare_factor = &*own->factor;
  // Some errors are told from W as it came.
  input.spare_weights = use.consume_weights && (layer.zeroed.rows() > 0 || !layer.KeepsReference());
  input.spare_initial = use.consume_weights;
  RETURN_IF_ERROR(Round(input, result, context));
  return result;
}

double FactorFlops(const RoundedLayer& rounded, int64_t features) {
  const auto n = static_cast<double>(features);
  return static_cast<double>(rounded.factorisations) * n * n * n / 3;
}

double SweepFlops(const ResolvedSpec& spec, const RoundedLayer& rounded, int64_t rows,
                  int64_t features) {
  if (!rounded.damping->factor.has_value()) return 0;
  const auto n = static_cast<double>(features);
  // A pass of refinement forms r, and K^T r with K^T H K; the sweep runs once more, to measure.
  const int32_t refinement =
      rounded.refinement.has_value() ? 1 + 6 * rounded.refinement->passes : 0;
  return static_cast<double>(spec.scale_trials + refinement) * static_cast<double>(rows) * n * n;
}

}  // namespace certiq::engine
