#include "engine/damping/damping_search.h"

#include <algorithm>
#include <limits>
#include <memory>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "base/status.h"
#include "engine/certify/certify.h"
#include "engine/damping/failed_attempts.h"
#include "engine/linalg/quadratic_form.h"

namespace certiq::engine {
namespace {

// Rows on which the steps of a ladder are run and judged: an eighth, so that five steps cost less
// than the layer itself, within these limits. What is compared are sums of the errors of so many
// rows on the same tokens.
constexpr int64_t kLeastLadderRows = 64;
constexpr int64_t kMostLadderRows = 256;

int64_t LadderRows(int64_t rows) { return std::clamp(rows / 8, kLeastLadderRows, kMostLadderRows); }

// Where a ladder is climbed, the largest lambda whose error is within this of the least: held-out
// tokens are nearer to those of the fit than any others will be, so of what they cannot tell apart
// the most damped is preferred (the one-standard-error rule's reason).
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

// The runs of a ladder.
class Ladder {
 public:
  Ladder(const LayerProblem& problem, const ResolvedSpec& spec, const RunContext& context,
         LayerCertificate& certificate)
      : spec_(spec), context_(context), certificate_(certificate) {
    const int64_t all = problem.weights.rows();
    const std::vector<int64_t> rows = EvenlySpaced(LadderRows(all), all);
    layer_ = MakeWorkingLayer(spec, problem.statistics, SelectRows(problem.weights, rows), context);
    layer_.factors = problem.factors;
    certificate.held_out_rows = static_cast<int64_t>(rows.size());
    unit_ = MeanDiagonal(layer_.statistics().gram);
    spec_.on_failure = OnFailure::kFail;
    if (spec.grid != nullptr) spec_.grid = SelectRows(*spec.grid, rows, all);
  }

  absl::StatusOr<double> Choose(SharedStatistics held_out) {
    absl::StatusOr<Unseen> unseen = MakeUnseen(std::move(held_out), layer_, context_);
    if (!unseen.ok()) return unseen.status();
    unseen_ = *std::move(unseen);
    const ResolvedSpec whole = spec_;
    spec_.scale_trials = 1;
    spec_.polish = 0;
    std::vector<Run> plain(spec_.damping_ladder.size());
    absl::StatusOr<size_t> best = spec_.damping_climb ? Climb(plain) : Least(All(), plain);
    if (!best.ok()) return best.status();
    best = MostDamped(*best, plain);
    if (!best.ok()) return best.status();
    const bool searches = whole.scale_trials > 1 || whole.polish > 0;
    if (!searches) return Chosen(plain[*best]);
    spec_ = whole;
    std::vector<Run> runs(plain.size());
    std::vector<size_t> around;
    for (size_t i = 0; i < plain.size(); ++i) {
      // A closer fit wants more damping, never less. A step that could not be factored is no
      // candidate.
      if (i >= *best && i <= *best + 1 && !plain[i].failed) around.push_back(i);
    }
    best = Least(around, runs);
    if (!best.ok()) return best.status();
    size_t chosen = *best;
    for (const size_t i : around) {
      if (spec_.damping_climb && i > chosen && Near(runs[i], runs[*best])) chosen = i;
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
    std::vector<size_t> all(spec_.damping_ladder.size());
    for (size_t i = 0; i < all.size(); ++i) all[i] = i;
    return all;
  }

  // Runs step i of the ladder if it has not been. A step that cannot be factored is not a
  // candidate: said, not returned.
  absl::Status Try(size_t i, std::vector<Run>& runs) {
    Run& run = runs[i];
    if (run.done) return absl::OkStatus();
    run.done = true;
    std::vector<StabilityCause>& failures = certificate_.ladder_failures;
    const double ratio = spec_.damping_ladder[i];
    absl::StatusOr<Fit> fit =
        RunFit(spec_, layer_, ratio * unit_, {.certified = false, .consume_factor = true}, context_,
               certificate_.seconds);
    if (!fit.ok()) {
      if (!base::PreconditionOf(fit.status()).has_value()) return fit.status();
      run.failed = true;
      last_ = fit.status();
      const std::vector<StabilityCause> causes = FailedAttemptsOf(last_);
      failures.insert(failures.end(), causes.begin(), causes.end());
      certificate_.warnings.push_back(
          absl::StrCat("ladder step ", ratio, " was left out: ", last_.message()));
      return absl::OkStatus();
    }
    for (const DampingAttempt& attempt : fit->damping->attempts) {
      if (attempt.cause != StabilityCause::kNone) failures.push_back(attempt.cause);
    }
    certificate_.factor_flops += FactorFlops(*fit, layer_.statistics().features());
    certificate_.round_flops +=
        SweepFlops(spec_, *fit, certificate_.held_out_rows, layer_.statistics().features());
    const absl::StatusOr<double> error = UnseenError(unseen_, layer_, *fit, context_);
    if (!error.ok()) return error.status();
    certificate_.ladder.push_back(
        {fit->damping->lambda_used, *error, spec_.scale_trials, spec_.polish});
    run.error = *error;
    run.ratio = fit->damping->lambda_used / unit_;
    return absl::OkStatus();
  }

  // The step of least error, the first of several.
  absl::StatusOr<size_t> Least(const std::vector<size_t>& steps, std::vector<Run>& runs) {
    std::optional<size_t> best;
    for (const size_t i : steps) {
      if (absl::Status tried = Try(i, runs); !tried.ok()) return tried;
      if (runs[i].failed) continue;
      if (!best.has_value() || runs[i].error < runs[*best].error) best = i;
    }
    if (best.has_value()) return *best;
    AttachFailedAttempts(certificate_.ladder_failures, last_);
    return last_;
  }

  static bool Near(const Run& run, const Run& best) {
    return !run.failed && run.error <= kTolerance * best.error;
  }

  // From the best step on to larger lambda while the error stays near it, where the ladder is
  // climbed.
  absl::StatusOr<size_t> MostDamped(size_t best, std::vector<Run>& runs) {
    if (!spec_.damping_climb) return best;
    size_t at = best;
    while (at + 1 < runs.size()) {
      if (absl::Status tried = Try(at + 1, runs); !tried.ok()) return tried;
      if (!Near(runs[at + 1], runs[best])) break;
      ++at;
    }
    return at;
  }

  // From the middle on to a step that no neighbour betters, looking at the larger one first: that
  // one is needed in any case. A step that fails counts as worse than any.
  absl::StatusOr<size_t> Climb(std::vector<Run>& runs) {
    const size_t steps = runs.size();
    size_t at = steps / 2;
    size_t next = at;
    do {
      at = next;
      for (const size_t i : {at, std::min(steps - 1, at + 1), at == 0 ? 0 : at - 1}) {
        if (absl::Status tried = Try(i, runs); !tried.ok()) return tried;
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
  Unseen unseen_;
  double unit_ = 0;
  absl::Status last_;
};

}  // namespace

absl::StatusOr<Unseen> MakeUnseen(SharedStatistics held_out, const WorkingLayer& layer,
                                  const RunContext& context) {
  Unseen unseen;
  unseen.sums =
      layer.order.empty()
          ? std::move(held_out)
          : std::make_shared<const Statistics>(Permute(*held_out, layer.order, *context.executor));
  if (unseen.sums->mismatch.has_value()) {
    auto initial = ComputeInitialError(*unseen.sums, Widen(layer.reference, *context.executor),
                                       Phase::kCertify, context);
    if (!initial.ok()) return initial.status();
    unseen.initial = *std::move(initial);
  }
  const auto energies = ReferenceEnergies(*unseen.sums, layer.reference, Phase::kCertify, context);
  if (!energies.ok()) return energies.status();
  unseen.energy = Sum(*energies);
  return unseen;
}

// Relative error of the fit on them.
absl::StatusOr<double> UnseenError(const Unseen& unseen, const WorkingLayer& layer, const Fit& fit,
                                   const RunContext& context) {
  const auto errors = SquaredErrors(*unseen.sums, layer.reference, fit.output.change,
                                    unseen.initial.has_value() ? &*unseen.initial : nullptr,
                                    Phase::kCertify, context);
  if (!errors.ok()) return errors.status();
  return RelativeError(Sum(*errors), unseen.energy);
}

double FactorFlops(const Fit& fit, int64_t features) {
  const auto n = static_cast<double>(features);
  return static_cast<double>(fit.factorisations) * n * n * n / 3;
}

double SweepFlops(const ResolvedSpec& spec, const Fit& fit, int64_t rows, int64_t features) {
  if (!fit.damping->factor.has_value()) return 0;
  const auto n = static_cast<double>(features);
  // A pass of polish: r, and K^T r with K^T H K; once more the sweep, to measure.
  const double polish = fit.polish.has_value() ? 1 + 6.0 * fit.polish->passes : 0;
  return (spec.scale_trials + polish) * static_cast<double>(rows) * n * n;
}

absl::StatusOr<double> ChooseDamping(const LayerProblem& problem, const ResolvedSpec& spec,
                                     const RunContext& context, LayerCertificate& certificate) {
  return Ladder(problem, spec, context, certificate).Choose(problem.held_out);
}

}  // namespace certiq::engine
