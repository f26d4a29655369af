// Blocked feedback sweep, shared by every method with error feedback.

#ifndef CERTIQ_ENGINE_METHODS_FEEDBACK_SWEEP_H_
#define CERTIQ_ENGINE_METHODS_FEEDBACK_SWEEP_H_

#include <cstdint>
#include <vector>

#include "absl/status/status.h"
#include "engine/kernels/aligned.h"
#include "engine/kernels/strip_matrix.h"
#include "engine/linalg/feedback_columns.h"
#include "engine/methods/method.h"
#include "engine/run_context.h"
#include "engine/scales/qparams.h"
#include "engine/spec.h"

namespace certiq::engine {

// What Qronos' first feature adds to a row's error beside the others: d (w_1 - q_1 + shift)^2.
struct FirstError {
  double d = 0;
  // One a row.
  std::vector<double> shift;
};

// How the sweep treats weights.
struct SweepRules {
  // Working order: feature i is original feature order[i]; empty: natural.
  const std::vector<int64_t>* order = nullptr;
  // Groups from this one on take their scale from the updated weights when
  // the sweep reaches them (dynamic scales); past the last group: none do.
  int64_t first_dynamic_group = 0;
  // Scale trials: a sweep for each, with every scale of a row times this and rounded to the scale's
  // type; each row keeps the first of those with the least sum_j e_j^2 D_j, which is the true error
  // (M3), (M7). Empty: one sweep with the scales as they are.
  std::vector<float> multipliers;
  // Row-major [rows, features]: codes that are given, so that the sweep only measures them; null:
  // it chooses.
  const UnsetVector<uint8_t>* codes = nullptr;
  // What is added to every target beside the feedback, o below; null: nothing.
  const StripMatrix* offsets = nullptr;
  // What D_1 = 0 leaves out of sums where there are offsets, to compare trials; null: nothing.
  const FirstError* first = nullptr;
  // What dynamic scales are found by; needed where the rule looks at more than the weights.
  const ScaleMetric* metric = nullptr;
};

// (M2) for every row: v_j = w_j + o_j + sum_{k<j} (w_k - q_k) U_kj, q_j = Q(v_j), e_j = v_j - q_j,
// in float32, with o = 0 for OPTQ; Qronos has offsets (see qronos.h). On return `weights` holds
// w - q. Q rounds to the nearest level (ties to the even code), or up or down with the probability
// that makes it unbiased, from a random number keyed by seed, row and original column.
//
// Dynamic groups: with the columns of group g next and P = o_g + sum_{k before g} (w_k - q_k) U_k,g
// the updated weights are v* = w_g + P U_gg^-1 (a column's own group still moves it); their scale
// is chosen by the spec's rule and written to result.grid.
//
// `bound_d` is D with zeros for dead features, which take no part in the sums. The sweep fills the
// result's codes, clipping, what (B5) needs, `rounding` = sum_j e_j^2 D_j (M3) and `bound` =
// sum_j eps_j^2 D_j (B1), eps_j = max(delta_j / 2, |e_j|) widened by the rounding of v_j.
// Costs R N^2 flops: per block of columns one product with what came before it, then a triangular
// sweep inside the block. Rows are independent and results do not depend on
// the executor. Fails only by cancellation.
absl::Status FeedbackSweep(const ResolvedSpec& spec, const SweepRules& rules,
                           const FeedbackColumns& u, const std::vector<double>& bound_d,
                           StripMatrix& weights, RoundedLayer& result, const RunContext& context);

}  // namespace certiq::engine

#endif  // CERTIQ_ENGINE_METHODS_FEEDBACK_SWEEP_H_
