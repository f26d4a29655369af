#include "engine/methods/rtn.h"

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <vector>

#include "absl/base/thread_annotations.h"
#include "base/mutex.h"
#include "base/status.h"
#include "base/status_macros.h"
#include "engine/gram/quadratic_form.h"
#include "engine/linalg/sigma_max.h"
#include "engine/methods/required_bits.h"
#include "engine/methods/round_column.h"

namespace certiq::engine {

std::vector<RowReach> RoundAlone(const ResolvedSpec& spec, const WorkingLayer& layer,
                                 const std::vector<double>& feature_norms,
                                 const UnsetVector<uint8_t>* codes, const RunContext& context,
                                 RoundedLayer& result) {
  const StripMatrix& weights = layer.weights();
  const Grid& grid = result.grid;
  const int64_t rows = weights.rows();
  const int64_t features = weights.features();
  result.codes.resize(static_cast<size_t>(rows * features));
  result.change = StripMatrix(rows, features);
  result.clipped.assign(static_cast<size_t>(rows), 0);
  std::vector<RowReach> reaches(static_cast<size_t>(rows));
  struct {
    base::Mutex mu;
    double worst ABSL_GUARDED_BY(mu) = 0;
  } overshoot;

  context.executor->ParallelFor(weights.strips(), [&](int64_t s) {
    const int64_t first = s * kStripRows;
    const int64_t live = std::min(kStripRows, rows - first);
    const StripGrid steps(grid, first);
    StripSums sums;
    double reach[kStripRows] = {};
    double width[kStripRows] = {};
    for (int64_t j = 0; j < features; ++j) {
      const float* v = weights.strip(s) + j * kStripRows;
      float* change = result.change.strip(s) + j * kStripRows;
      const int64_t group = grid.group_of[static_cast<size_t>(j)];
      float code[kStripRows];
      float level[kStripRows];
      if (codes != nullptr) {
        LoadCodes(*codes, features, first, j, steps, code);
      } else if (spec.rounding == Rounding::kNearest) {
        NearestCodes(steps, group, v, code);
      } else {
        StochasticCodes(steps, group, v, spec.seed, first,
                        layer.order.empty() ? j : layer.order[static_cast<size_t>(j)], code);
      }
      AddRounded(steps, group, spec.rounding, 0, v, code, level, sums);
      const double norm = feature_norms[static_cast<size_t>(j)];
      const float* scale = steps.scale.data() + group * kStripRows;
      for (int64_t c = 0; c < kStripRows; ++c) {
        change[c] = v[c] - level[c];
        const double eps =
            std::max(0.5 * static_cast<double>(scale[c]), std::abs(static_cast<double>(change[c])));
        reach[c] += eps * norm;
        if (norm > 0) width[c] += eps * eps;
      }
      for (int64_t c = 0; c < live; ++c) {
        result.codes[static_cast<size_t>((first + c) * features + j)] =
            static_cast<uint8_t>(static_cast<int32_t>(code[c]));
      }
    }
    double worst = 0;
    for (int64_t c = 0; c < live; ++c) {
      const auto r = static_cast<size_t>(first + c);
      result.clipped[r] = sums.clipped[c];
      reaches[r] = {reach[c], width[c]};
      worst = std::max(worst, static_cast<double>(sums.overshoot[c]));
    }
    const base::MutexLock lock(overshoot.mu);
    overshoot.worst = std::max(overshoot.worst, worst);
  });
  const base::MutexLock lock(overshoot.mu);
  result.worst_overshoot = overshoot.worst;
  return reaches;
}

absl::Status Nearest(const MethodInput& input, RoundedLayer& result, const RunContext& context) {
  const WorkingLayer& layer = input.layer;
  const UpperTriangle<double>& gram = layer.statistics().gram;
  std::vector<double> norms(static_cast<size_t>(gram.size()));
  for (int64_t j = 0; j < gram.size(); ++j) norms[j] = std::sqrt(gram.at(j, j));
  const std::vector<RowReach> reaches =
      RoundAlone(input.spec, layer, norms, input.codes, context, result);
  ASSIGN_OR_RETURN(const double sigma, LargestEigenvalueBound(gram, context));
  if (!std::isfinite(sigma)) {
    return base::InvalidField("x", "expected activations whose sums are finite");
  }
  ASSIGN_OR_RETURN(result.damped, SquaredErrors(layer.statistics(), layer.reference, result.change,
                                                layer.initial_error(), Phase::kRound, context));
  if (layer.mismatched()) result.initial = Roots(layer.initial->squares);
  result.bound.clear();
  for (size_t r = 0; r < reaches.size(); ++r) {
    const double bound = std::min(reaches[r].weighted, std::sqrt(reaches[r].squares * sigma));
    // The statistics' own rounding, where a bound is attained.
    result.bound.push_back((1 + 1e-6) * (bound + (result.initial.empty() ? 0 : result.initial[r])));
  }
  if (input.certified) {
    result.bits_needed = RequiredBits(input.spec, result.grid, {}, layer.weights(), context);
  }
  return absl::OkStatus();
}

}  // namespace certiq::engine
