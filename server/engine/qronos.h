// Qronos (arXiv 2505.11695): OPTQ for a layer whose inputs earlier
// quantization has changed.

#ifndef CERTIQ_ENGINE_QRONOS_H_
#define CERTIQ_ENGINE_QRONOS_H_

#include <vector>

#include "absl/status/statusor.h"
#include "engine/method.h"

namespace certiq::engine {

// What the sweep of (M6) starts from. Vectors have one entry a row.
struct QronosStart {
  // Feature 0 (in working order): the level q_1 itself, so that the sweep leaves it as it is;
  // the others: v of (M5).
  StripMatrix targets;
  // v_1, and e_1 = v_1 - q_1.
  std::vector<double> first_target;
  std::vector<double> first_error;
  // The first term of (M7), squared and damped, with the actual q_1.
  std::vector<double> initial;
  // (B3)'s initial term before anything is rounded, squared and damped.
  std::vector<double> prior_initial;
  // (M8), squared and damped.
  std::vector<double> floor;
  // |P w|^2 = |X w - X~ w|^2, what OPTQ would start with.
  std::vector<double> unchanged;
};

// With y = (G - H) w = X~^T P w, P = X - X~ (damping cancels):
//   (M4)  v_1 = w_1 + y_1 / H_11, q_1 = Q(v_1);
//   (M5)  v_2.. = w_2.. + z, H_22 z = y_2.. + H_21 (w_1 - q_1), by the trailing block of U D U^T;
// and from a = U^-1 y, at no further cost, with m = |P w|^2:
//   (M8)  floor^2 = m - sum_j a_j^2 / D_j;
//   (M7)  initial^2 = m + 2 y_1 t + H_11 t^2 - sum_{j>=2} (a_j + t D_j U_1j)^2 / D_j, t = w_1 -
//   q_1; (B3)  prior_initial^2: the same with t = -y_1 / H_11, its minimiser.
// All in float64: lambda may be 1e-6 of the largest eigenvalue. REQUIRES: mismatched inputs. Costs
// 4 R N^2 flops. Fails only by cancellation.
absl::StatusOr<QronosStart> StartQronos(const MethodInput& input, const Factor& factor,
                                        double lambda, const Grid& grid, const RunContext& context);

// Qronos on mismatched inputs (M4-M7), bounded by (B3); with matched inputs G = H, the start is W
// with the feedback of q_1, and the method is OPTQ. The first dynamic group, if any, takes its
// step from W: q_1 is needed before its other weights are updated. Fails only by cancellation.
absl::StatusOr<MethodOutput> Qronos(const MethodInput& input, const Factor& factor, double lambda,
                                    Grid& grid, const RunContext& context);

}  // namespace certiq::engine

#endif  // CERTIQ_ENGINE_QRONOS_H_
