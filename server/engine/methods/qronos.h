// Qronos (arXiv 2505.11695): OPTQ for a layer whose inputs earlier quantization has changed.

#ifndef CERTIQ_ENGINE_METHODS_QRONOS_H_
#define CERTIQ_ENGINE_METHODS_QRONOS_H_

#include <cstdint>

#include "absl/status/status.h"
#include "engine/methods/method.h"
#include "engine/run_context.h"

namespace certiq::engine {

// With y = (G - H) w = X~^T P w, P = X - X~ (damping cancels), a = U^-1 y and H = U D U^T:
//   (M4)  v_1 = w_1 + y_1 / H_11, q_1 = Q(v_1);
//   (M5)  v_2.. = w_2.. + z, H_22 z = y_2.. + H_21 (w_1 - q_1), by the trailing block of U D U^T;
//   (M6)  then OPTQ on v.
// The second triangular solve of (M5) and the feedback of z in (M6) undo each other: U_22^T z = b
// with b_j = a_j / D_j + (w_1 - q_1) U_1j, so what OPTQ rounds at j >= 2 is
//   v_j + sum_{2<=k<j} (v_k - q_k) U_kj = w_j + a_j / D_j + sum_{k<j} (w_k - q_k) U_kj:
// the sweep of W with the offsets o_j = a_j / D_j (o_1 = y_1 / H_11). With m = |P w|^2,
//   (M8)  floor^2 = m - sum_j a_j^2 / D_j;
//   (M7)  initial^2 = floor^2 + D_1 (w_1 + a_1 / D_1 - q_1)^2
//         (from y_1 = a_1 + sum_{j>=2} U_1j a_j and H_11 = D_1 + sum_{j>=2} U_1j^2 D_j);
//   (B3)  before anything is rounded, with v_1 for q_1: floor^2 + D_1 (a_1 / D_1 - y_1 / H_11)^2.
//
// y and a take 3 R N^2 flops in float64 (lambda may be 1e-6 of the largest eigenvalue), and that is
// done where R is at most N / 2. With more rows A = D^-1 U^-1 X~^T P is computed in float64, N^3
// flops, what amplifies errors is behind it, and o = A w and m take 3 R N^2 flops in float32; rows
// where m - sum a^2 / D would lose digits by that are done in float64 all the same.
//
// Matched inputs: G = H, the offsets are zero, and the method is OPTQ. The first dynamic group, if
// any, takes its scale from W: q_1 is needed before its other weights are updated. REQUIRES:
// result.damping has a factor. Fails as OPTQ does.
absl::Status Qronos(const MethodInput& input, RoundedLayer& result, const RunContext& context);

// Whether Qronos needs the initial error of a layer of this size.
bool QronosNeedsInitialError(int64_t rows, int64_t features);

}  // namespace certiq::engine

#endif  // CERTIQ_ENGINE_METHODS_QRONOS_H_
