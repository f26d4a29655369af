// Refinement of a rounded layer: coordinate descent on codes (S7), scales refitted to codes (S6).

#ifndef CERTIQ_ENGINE_METHODS_REFINE_H_
#define CERTIQ_ENGINE_METHODS_REFINE_H_

#include <cstdint>

#include "absl/status/statusor.h"
#include "engine/kernels/aligned.h"
#include "engine/methods/method.h"
#include "engine/run_context.h"
#include "engine/scales/qparams.h"

namespace certiq::engine {

// The objective is the damped squared error of a row less what no code changes. With c = w - q, H =
// X~^T X~ + lambda I and y = X~^T (X - X~) w (none where inputs are matched)
//   f(q) = c^T H c + 2 y c,   r = H c + y = G w - H q = -f'(q) / 2.
// A pass, over the features of a row:
//   (S6) unless the grid is explicit, all scales at once: with q_g = s_g K_g, A_gh = K_g^T H_gh
//        K_h, the step ds solves A ds = (K_g^T r_g)_g; it is rounded to the scale's type and taken
//        only where -2 ds^T K^T r + ds^T A ds is then still below zero. More than kJointGroups
//        groups are fitted so many at a time, each lot given the others;
//   (S7) feature by feature, q_j <- Q(q_j + r_j / H_jj), which is the best of all levels since f is
//        a parabola in q_j, and taken only where f falls.
// A row stops at `spec.polish` passes, or where a pass changes nothing: no change of one code then
// lowers f by more than 1e-5 H_jj times the change squared (and float32's rounding of r).
// Features come group by group. r is formed anew for each block of features, in float32 from the
// codes as they are, so that nothing drifts. Rows are independent and results do not depend on the
// executor. Costs 2 R N^2 flops a pass, and 4 R N^2 for (S6), or 2 R N^2 + R N^2 where groups are
// many; N^2 floats of memory. `input.spec.rounding` must be nearest. Changes `grid` and `codes`
// (row-major [rows, features]). Returns the most passes that a row took. Fails only by
// cancellation.
absl::StatusOr<int32_t> Refine(const MethodInput& input, double lambda, Grid& grid,
                               UnsetVector<uint8_t>& codes, const RunContext& context);

// Bytes held by it beside its arguments, on `threads` threads.
int64_t RefineBytes(int64_t features);

}  // namespace certiq::engine

#endif  // CERTIQ_ENGINE_METHODS_REFINE_H_
