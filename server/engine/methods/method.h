// What every method takes and gives.

#ifndef CERTIQ_ENGINE_METHODS_METHOD_H_
#define CERTIQ_ENGINE_METHODS_METHOD_H_

#include <cstdint>
#include <optional>
#include <vector>

#include "engine/certificate.h"
#include "engine/gram/gram.h"
#include "engine/kernels/aligned.h"
#include "engine/kernels/strip_matrix.h"
#include "engine/linalg/quadratic_form.h"
#include "engine/linalg/udu_factor.h"
#include "engine/run_context.h"
#include "engine/scales/qparams.h"
#include "engine/spec.h"

namespace certiq::engine {

// Everything is in working order (see order.h).
struct MethodInput {
  const ResolvedSpec& spec;
  const Statistics& statistics;
  const std::vector<bool>& dead;
  // Element i: the original feature at step i; empty: natural.
  const std::vector<int64_t>& order;
  // W as it came; what the layer's output is compared with.
  const StripMatrix& reference;
  // W with zeros at dead features.
  const StripMatrix& weights;
  // Of `reference`; null where inputs are matched, or the method needs none.
  InitialError* initial;
  // Where the time goes; rounding is the caller's.
  EngineSeconds& seconds;
  // Whether what only a certificate needs is wanted: the bits needed (B6).
  bool certified = true;
  // Row-major [rows, features]: codes that are given, so that the method only measures them on the
  // grid as it is; null: it chooses.
  const UnsetVector<uint8_t>* codes = nullptr;
  // What nobody needs afterwards, for the method to take apart: `weights` itself, the factor (null
  // where they are needed or shared), the initial error.
  StripMatrix* spare_weights = nullptr;
  Factor* spare_factor = nullptr;
  bool spare_initial = false;
  // For dynamic groups; null where steps depend on the weights alone.
  const StepRules* steps = nullptr;
};

// Damped squared norms of what error is there before anything is rounded, summed over rows (B3,
// M8).
struct InitialTerms {
  double qronos = 0;
  double optq = 0;
  double floor = 0;
};

// Vectors have one entry a row.
struct MethodOutput {
  // Row-major [rows, features].
  UnsetVector<uint8_t> codes;
  // W - Q, zeros at dead features.
  StripMatrix change;
  // Damped squared error: (M3), (M7); undamped for NEAREST, which has no damping.
  std::vector<double> damped;
  // sum_j e_j^2 D_j, which equals |X~ (t - q)|^2 + lambda |t - q|^2 for the method's start t.
  std::vector<double> rounding;
  // The bound on the damped error, a norm: (B1), (B2), (B3).
  std::vector<double> bound;
  // The part of it that is there before rounding, a norm; empty where inputs are matched.
  std::vector<double> initial;
  std::vector<int32_t> clipped;
  double worst_overshoot = 0;
  // For (B5); empty unless rounding is stochastic with feedback.
  std::vector<double> widest;
  std::vector<double> clipped_reach;
  // Only where inputs are mismatched and the method has feedback.
  std::optional<InitialTerms> terms;
  std::optional<int32_t> bits_needed;
};

// Square roots.
std::vector<double> Roots(const std::vector<double>& squares);

// |row|^2 of every row.
std::vector<double> RowNorms(const StripMatrix& rows, Executor& executor);

}  // namespace certiq::engine

#endif  // CERTIQ_ENGINE_METHODS_METHOD_H_
