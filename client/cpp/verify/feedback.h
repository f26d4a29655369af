// Error feedback of OPTQ and Qronos, recomputed from the factor of H.
#ifndef CERTIQ_CLIENT_CPP_VERIFY_FEEDBACK_H_
#define CERTIQ_CLIENT_CPP_VERIFY_FEEDBACK_H_

#include <cstdint>
#include <vector>

#include "absl/status/statusor.h"
#include "layer.h"
#include "linear_algebra.h"
#include "token_errors.h"

namespace certiq::verify {

// Features in working order; vectors and rows by row of W.
struct Feedback {
  // As Layer::order, with neighbours of nearly equal norm the way round they were worked on.
  std::vector<int64_t> order;
  int64_t swapped = 0;
  // H = X~^T X~ + lambda I (dead features: lambda, or 1 where lambda is 0) = U D U^T (M1).
  Matrix h;
  Factor factor;
  Matrix inverse_u;
  // Start t of the method: OPTQ W (zeros at dead features); Qronos (q_1, v) of (M4), (M5).
  Matrix start;
  // What targets are as long as nothing is rounded (B6): OPTQ W; Qronos v with v_1 for q_1.
  Matrix unrounded;
  // Qronos' v_1 [R], before it was rounded; empty otherwise.
  Vector first_target;
  // e = (t - q) U (M3), and for Qronos e_1 = v_1 - q_1.
  Matrix e;
  // What is there before rounding, squared and damped: with the actual q_1 (M7), before anything
  // is rounded (B3), and the floor (M8). OPTQ: |P w|^2 for the first two. Zero where matched.
  Vector initial;
  Vector prior_initial;
  Vector floor;
  // How far, relative, x H x^T may be off in the service's sums of float32 products, for the worst
  // x: what the certified numbers may be off on that account. See SumsSlack.
  double slack = 0;
};

// REQUIRES: the method is OPTQ or QRONOS and `errors` has the residual where inputs are mismatched.
// INVALID_ARGUMENT where H has no factor.
absl::StatusOr<Feedback> Recompute(const Layer& layer, const v1::QuantizationSpec& spec,
                                   double lambda, const OutputErrors& errors);

}  // namespace certiq::verify

#endif  // CERTIQ_CLIENT_CPP_VERIFY_FEEDBACK_H_
