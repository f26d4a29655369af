#include "engine/damping/damping_search.h"

#include <algorithm>
#include <limits>
#include <memory>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "base/status.h"
#include "base/status_macros.h"
#include "engine/gram/form_rounding.h"
#include "engine/gram/quadratic_form.h"
#include "engine/linalg/failed_attempts.h"
#include "engine/methods/rtn.h"
#include "engine/methods/run_method.h"
#include "engine/scales/qparams.h"

namespace certiq::engine {
namespace {

// Candidates are run and judged on an eighth of the rows, so that five of them cost less than the
// layer itself, within these limits. Sums of the errors of these rows on the same tokens are
// compared.
constexpr int64_t kLeastSearchRows = 64;
constexpr int64_t kMostSearchRows = 256;

int64_t SearchRows(int64_t rows) { return std::clamp(rows / 8, kLeastSearchRows, kMostSearchRows); }

// With `damping_climb` the largest lambda whose error is within this of the least is taken:
// held-out tokens are nearer to those of the fit than any others will be, so of what they cannot
// tell apart the most damped is preferred (the one-standard-error rule's reason).
constexpr double kTolerance = 1.02;

// The part of a grid that belongs to some of `all` rows.
std::shared_ptr<const ExplicitGrid> SelectRows(const ExplicitGrid& grid,
                                               const std::vector<int64_t>& rows, int64_t all) {
  ExplicitGrid selected = grid;
  selected.scales.clear();
  selected.zero_points.clear();
  const auto groups = static_cast<int64_t>(grid.scales.size()) / all;
  for (const int64_t row : rows) {
    for (int64_t at = row * groups; at < (row + 1) * groups; ++at) {
      selected.scales.push_back(grid.scales[static_cast<size_t>(at)]);
      if (!grid.zero_points.empty()) {
        selected.zero_points.push_back(grid.zero_points[static_cast<size_t>(at)]);
      }
    }
  }
  return std::make_shared<const ExplicitGrid>(std::move(selected));
}

// The runs of the candidates, each at most once with trials and refinement and once without.
class DampingSearch {
 public:
  DampingSearch(const LayerProblem& problem, const ResolvedSpec& spec, const RunContext& context,
                LayerCertificate& certificate)
      : spec_(spec), context_(context), certificate_(certificate) {
    const int64_t all = problem.weights.rows();
    const std::vector<int64_t> rows = EvenlySpaced(SearchRows(all), all);
    layer_ = MakeWorkingLayer(spec, problem.statistics, SelectRows(problem.weights, rows), context);
    layer_.factors = problem.factors;
    layer_.row_names = rows;
    certificate.held_out_rows = static_cast<int64_t>(rows.size());
    unit_ = MeanDiagonal(layer_.statistics().gram);
    spec_.on_failure = OnFailure::kFail;
    if (spec.grid != nullptr) spec_.grid = SelectRows(*spec.grid, rows, all);
  }

  absl::StatusOr<double> Choose(SharedStatistics held_out) {
    ASSIGN_OR_RETURN(held_out_, MakeHeldOutSet(std::move(held_out), layer_, context_));
    ASSIGN_OR_RETURN(certificate_.held_out_nearest_relative_error,
                     HeldOutNearestError(held_out_, layer_, spec_, context_));
    const ResolvedSpec whole = spec_;
    spec_.scale_trials = 1;
    spec_.polish = 0;
    std::vector<Run> plain(spec_.damping_candidates.size());
    ASSIGN_OR_RETURN(size_t best, spec_.damping_climb ? Climb(plain) : Least(All(), plain));
    ASSIGN_OR_RETURN(best, MostDamped(best, plain));
    const bool searches = whole.scale_trials > 1 || whole.polish > 0;
    if (!searches) return Chosen(plain[best]);
    spec_ = whole;
    std::vector<Run> runs(plain.size());
    std::vector<size_t> around;
    for (size_t i = 0; i < plain.size(); ++i) {
      // A closer fit wants more damping, never less. What could not be factored is left out.
      if (i >= best && i <= best + 1 && !plain[i].failed) around.push_back(i);
    }
    ASSIGN_OR_RETURN(best, Least(around, runs));
    size_t chosen = best;
    for (const size_t i : around) {
      if (spec_.damping_climb && i > chosen && Near(runs[i], runs[best])) chosen = i;
    }
    return Chosen(runs[chosen]);
  }

 private:
  struct Run {
    bool done = false;
    bool failed = false;
    double error = std::numeric_limits<double>::infinity();
    double ratio = 0;
  };

  double Chosen(const Run& run) {
    certificate_.held_out_relative_error = run.error;
    return run.ratio;
  }

  std::vector<size_t> All() const {
    std::vector<size_t> all(spec_.damping_candidates.size());
    for (size_t i = 0; i < all.size(); ++i) all[i] = i;
    return all;
  }

  // Runs candidate i if it has not been. A candidate that cannot be factored is left out with a
  // warning and is no error.
  absl::Status Try(size_t i, std::vector<Run>& runs) {
    Run& run = runs[i];
    if (run.done) return absl::OkStatus();
    run.done = true;
    std::vector<StabilityCause>& failures = certificate_.search_failures;
    const double ratio = spec_.damping_candidates[i];
    absl::StatusOr<RoundedLayer> rounded =
        RunMethod(spec_, layer_, ratio * unit_, {.certified = false, .consume_factor = true},
                  context_, certificate_.seconds);
    if (!rounded.ok()) {
      if (!base::PreconditionOf(rounded.status()).has_value()) return rounded.status();
      run.failed = true;
      last_ = rounded.status();
      const std::vector<StabilityCause> causes = FailedAttemptsOf(last_);
      failures.insert(failures.end(), causes.begin(), causes.end());
      certificate_.warnings.push_back(
          absl::StrCat("ladder step ", ratio, " was left out: ", last_.message()));
      return absl::OkStatus();
    }
    for (const DampingAttempt& attempt : rounded->damping->attempts) {
      if (attempt.cause != StabilityCause::kNone) failures.push_back(attempt.cause);
    }
    certificate_.factor_flops += FactorFlops(*rounded, layer_.statistics().features());
    certificate_.round_flops +=
        SweepFlops(spec_, *rounded, certificate_.held_out_rows, layer_.statistics().features());
    ASSIGN_OR_RETURN(const double error,
                     HeldOutError(held_out_, layer_, rounded->change, context_));
    certificate_.damping_candidates.push_back(
        {rounded->damping->lambda_used, error, spec_.scale_trials, spec_.polish});
    run.error = error;
    run.ratio = rounded->damping->lambda_used / unit_;
    return absl::OkStatus();
  }

  // The candidate of least error, the first of several.
  absl::StatusOr<size_t> Least(const std::vector<size_t>& candidates, std::vector<Run>& runs) {
    std::optional<size_t> best;
    for (const size_t i : candidates) {
      RETURN_IF_ERROR(Try(i, runs));
      if (runs[i].failed) continue;
      if (!best.has_value() || runs[i].error < runs[*best].error) best = i;
    }
    if (best.has_value()) return *best;
    AttachFailedAttempts(certificate_.search_failures, last_);
    return last_;
  }

  static bool Near(const Run& run, const Run& best) {
    return !run.failed && run.error <= kTolerance * best.error;
  }

  // From the best on to larger lambda while the error stays near it, with `damping_climb`.
  absl::StatusOr<size_t> MostDamped(size_t best, std::vector<Run>& runs) {
    if (!spec_.damping_climb) return best;
    size_t at = best;
    while (at + 1 < runs.size()) {
      RETURN_IF_ERROR(Try(at + 1, runs));
      if (!Near(runs[at + 1], runs[best])) break;
      ++at;
    }
    return at;
  }

  // From the middle on to a candidate that no neighbour betters, looking at the larger one first:
  // that one is needed in any case. A candidate that fails counts as worse than any.
  absl::StatusOr<size_t> Climb(std::vector<Run>& runs) {
    const size_t count = runs.size();
    size_t at = count / 2;
    size_t next = at;
    do {
      at = next;
      for (const size_t i : {at, std::min(count - 1, at + 1), at == 0 ? 0 : at - 1}) {
        RETURN_IF_ERROR(Try(i, runs));
        if (!(runs[i].error < runs[at].error)) continue;
        next = i;
        break;
      }
    } while (next != at);
    // All around the middle failed: the others may not.
    if (runs[at].failed) return Least(All(), runs);
    return at;
  }

  ResolvedSpec spec_;
  const RunContext& context_;
  LayerCertificate& certificate_;
  WorkingLayer layer_;
  HeldOutSet held_out_;
  double unit_ = 0;
  absl::Status last_;
};

}  // namespace

absl::StatusOr<HeldOutSet> MakeHeldOutSet(SharedStatistics held_out, const WorkingLayer& layer,
                                          const RunContext& context) {
  HeldOutSet held;
  held.sums =
      layer.order.empty()
          ? std::move(held_out)
          : std::make_shared<const Statistics>(Permute(*held_out, layer.order, *context.executor));
  if (held.sums->mismatch.has_value()) {
    ASSIGN_OR_RETURN(held.initial,
                     ComputeInitialError(*held.sums, Widen(layer.reference, *context.executor),
                                         Phase::kCertify, context));
  }
  ASSIGN_OR_RETURN(std::vector<double> energies,
                   ReferenceEnergies(*held.sums, layer.reference, Phase::kCertify, context));
  RETURN_IF_ERROR(
      SettleErrors(*held.sums, layer.reference, layer.reference, Phase::kCertify, context, energies)
          .status());
  held.energy = Sum(energies);
  return held;
}

absl::StatusOr<double> HeldOutError(const HeldOutSet& held, const WorkingLayer& layer,
                                    const StripMatrix& change, const RunContext& context) {
  ASSIGN_OR_RETURN(
      std::vector<double> errors,
      SquaredErrors(*held.sums, layer.reference, change,
                    held.initial.has_value() ? &*held.initial : nullptr, Phase::kCertify, context));
  RETURN_IF_ERROR(
      SettleErrors(*held.sums, layer.reference, change, Phase::kCertify, context, errors).status());
  return RelativeError(Sum(errors), held.energy);
}

absl::StatusOr<std::optional<double>> HeldOutNearestError(const HeldOutSet& held,
                                                          const WorkingLayer& layer,
                                                          const ResolvedSpec& spec,
                                                          const RunContext& context) {
  ResolvedSpec plain = spec;
  plain.rounding = Rounding::kNearest;
  plain.scale = ScaleRule::kAbsmax;
  plain.signed_scales = false;
  const StripMatrix& weights = layer.weights();
  RoundedLayer rounded;
  rounded.grid = MakeGrid(plain, weights.rows(), weights.features(), layer.order);
  FillQuantParams(plain, weights, context, rounded.grid);
  if (context.cancelled()) return context.CancellationStatus();
  if (!CheckScales(plain, rounded.grid).ok()) return std::nullopt;
  RoundAlone(plain, layer, std::vector<double>(layer.dead.size()), nullptr, context, rounded);
  return HeldOutError(held, layer, rounded.change, context);
}

absl::StatusOr<double> ChooseDamping(const LayerProblem& problem, const ResolvedSpec& spec,
                                     const RunContext& context, LayerCertificate& certificate) {
  return DampingSearch(problem, spec, context, certificate).Choose(problem.held_out);
}

}  // namespace certiq::engine
