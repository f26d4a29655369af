#include "engine/scales/scale_objective.h"

#include <algorithm>
#include <cmath>

#include "base/status.h"
#include "base/status_macros.h"
#include "engine/gram/quadratic_form.h"
#include "engine/linalg/udu_factor.h"

namespace certiq::engine {
namespace {

std::vector<double> Diagonal(const UpperTriangle<double>& s, double shift,
                             const std::vector<bool>& dead) {
  std::vector<double> diagonal(static_cast<size_t>(s.size()));
  for (int64_t j = 0; j < s.size(); ++j) {
    const auto at = static_cast<size_t>(j);
    diagonal[at] = dead[at] ? 0 : s.at(j, j) + shift;
  }
  return diagonal;
}

// X^T X of mismatched inputs.
UpperTriangle<double> FloatGram(const Statistics& sums, Executor& executor) {
  const MismatchSums& mismatch = *sums.mismatch;
  UpperTriangle<double> gram(sums.features());
  const int64_t n = sums.features();
  executor.ParallelFor(n, [&](int64_t i) {
    for (int64_t j = i; j < n; ++j) {
      gram.at(i, j) = sums.gram.at(i, j) + mismatch.residual.at(i, j) +
                      mismatch.cross[static_cast<size_t>(i * n + j)] +
                      mismatch.cross[static_cast<size_t>(j * n + i)];
    }
  });
  return gram;
}

// Which rows of the metric a search reads.
PackedMetric::Rows RowsFor(const ResolvedSpec& spec) {
  const bool dynamic =
      spec.group_scales == GroupScales::kDynamic && spec.method != Method::kNearest;
  return spec.group_size == 0 || (spec.scale_passes > 0 && !dynamic) ? PackedMetric::Rows::kAll
                                                                     : PackedMetric::Rows::kOwn;
}

}  // namespace

absl::StatusOr<ScaleObjectiveTerms> ScaleObjectiveTerms::Make(const ResolvedSpec& spec,
                                                              const WorkingLayer& layer,
                                                              const DampedFactor& damped,
                                                              const Grid& grid,
                                                              const RunContext& context) {
  ScaleObjectiveTerms objective;
  objective.sums_ = layer.sums;
  const Statistics& sums = layer.statistics();
  const bool factored = damped.factor.has_value();
  const double shift = factored ? damped.lambda_used : 0;
  if (spec.scale == ScaleRule::kCompensated) {
    objective.diagonal_ =
        factored ? LiveD(*damped.factor, layer.dead) : Diagonal(sums.gram, 0, layer.dead);
  } else if (spec.scale_objective == ScaleObjective::kDataFree) {
    objective.diagonal_.assign(layer.dead.size(), 1);
  } else {
    const bool float_inputs =
        sums.mismatch.has_value() && spec.scale_objective == ScaleObjective::kInputs;
    const UpperTriangle<double> made =
        float_inputs ? FloatGram(sums, *context.executor) : UpperTriangle<double>();
    const UpperTriangle<double>& gram = float_inputs ? made : sums.gram;
    objective.diagonal_ = Diagonal(gram, shift, layer.dead);
    objective.metric_.emplace(gram, shift, grid.group_of, grid.groups, RowsFor(spec),
                              *context.executor);
    if (sums.mismatch.has_value() && spec.scale_objective == ScaleObjective::kMixed) {
      objective.own_cross_ = spec.scale_passes == 0 && grid.groups > 1;
      if (!objective.own_cross_ && layer.initial.has_value()) {
        objective.linear_ = layer.initial->cross;
      } else if (!objective.own_cross_) {
        ASSIGN_OR_RETURN(objective.linear_,
                         TimesSquare(Widen(layer.reference, *context.executor),
                                     sums.mismatch->cross, Phase::kRound, context));
      }
    }
  }
  for (const double value : objective.diagonal_) {
    if (std::isfinite(value)) continue;
    return base::InvalidField("x", "expected activations whose sums are finite");
  }
  return objective;
}

ScaleMetric ScaleObjectiveTerms::Metric(int64_t searched) const {
  ScaleMetric terms;
  terms.diagonal = diagonal_;
  terms.full = metric();
  terms.searched_groups = searched;
  return terms;
}

absl::Status ScaleObjectiveTerms::Improve(const ResolvedSpec& spec, int64_t searched,
                                          const StripMatrix& weights, const RunContext& context,
                                          Grid& grid) const {
  if (!metric_.has_value()) return absl::OkStatus();
  PisoObjective objective;
  objective.metric = &*metric_;
  objective.linear = linear_.has_value() ? &*linear_ : nullptr;
  objective.cross = own_cross_ ? &sums_->mismatch->cross : nullptr;
  objective.passes = metric_->rows() == PackedMetric::Rows::kAll ? spec.scale_passes : 0;
  objective.groups = std::min(searched, grid.groups);
  return ImproveByPiso(spec, objective, weights, context, grid);
}

int64_t ScaleObjectiveTerms::BytesFor(const ResolvedSpec& spec, int64_t rows, int64_t features,
                                      bool mismatched) {
  if (spec.scale != ScaleRule::kPiso || spec.scale_objective == ScaleObjective::kDataFree) return 0;
  int64_t bytes =
      PackedMetric::BytesFor(features, spec.group_size, RowsFor(spec)) + PisoBytes(spec, features);
  if (!mismatched) return bytes;
  if (spec.scale_objective == ScaleObjective::kInputs) {
    bytes += UpperTriangle<double>::ElementsFor(features) * 8;
  } else if (spec.scale_objective != ScaleObjective::kQuantizedInputs) {
    bytes += 2 * BasicStripMatrix<double>::BytesFor(rows, features);
  }
  return bytes;
}

}  // namespace certiq::engine
