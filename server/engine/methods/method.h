// The interface of the rounding methods: what each takes, and the rounded layer it leaves.

#ifndef CERTIQ_ENGINE_METHODS_METHOD_H_
#define CERTIQ_ENGINE_METHODS_METHOD_H_

#include <cstdint>
#include <memory>
#include <optional>
#include <vector>

#include "engine/certificate.h"
#include "engine/gram/layer.h"
#include "engine/kernels/aligned.h"
#include "engine/kernels/strip_matrix.h"
#include "engine/linalg/damped_factor.h"
#include "engine/scales/qparams.h"
#include "engine/spec.h"

namespace certiq::engine {

// One run of a method on a layer.
struct MethodInput {
  const ResolvedSpec& spec;
  // Its `initial` is there where the method needs it and inputs are mismatched.
  WorkingLayer& layer;
  // Where the time of the certificate's part goes; rounding is the caller's.
  EngineSeconds& seconds;
  // Whether what only a certificate needs is wanted: the bits needed (B6).
  bool certified = true;
  // For dynamic groups; null where scales depend on the weights alone.
  const ScaleMetric* metric = nullptr;
  // Row-major [rows, features]: codes that are given, so that the method only measures them on the
  // grid as it is; null: it chooses.
  const UnsetVector<uint8_t>* codes = nullptr;
  // What nobody needs afterwards, for the method to take apart: the layer's weights() and initial
  // error, and the factor (null where it is needed or shared).
  bool spare_weights = false;
  bool spare_initial = false;
  Factor* spare_factor = nullptr;
};

// Damped squared norms of what error is there before anything is rounded, summed over rows (B3,
// M8).
struct InitialTerms {
  double qronos = 0;
  double optq = 0;
  double floor = 0;
};

// A layer that is rounded, in working order, with what its certificate is made from. Vectors but
// `codes` have one entry a row; sums are float64.
struct RoundedLayer {
  Outcome outcome = Outcome::kQuantized;
  // Without attempts for NEAREST; never null.
  SharedFactor damping = std::make_shared<const DampedFactor>();
  // Factorisations that this run made itself.
  int64_t factorisations = 0;
  std::optional<RefineOutcome> refinement;

  Grid grid;
  // Row-major [rows, features].
  UnsetVector<uint8_t> codes;
  // W - Q, zeros at dead features.
  StripMatrix change;
  // Damped squared error: (M3), (M7); undamped for NEAREST, which has no damping.
  std::vector<double> damped;
  // sum_j e_j^2 D_j, which equals |X~ (t - q)|^2 + lambda |t - q|^2 for the method's start t; empty
  // without feedback.
  std::vector<double> rounding;
  // The bound on the damped error, a norm: (B1), (B2), (B3).
  std::vector<double> bound;
  // The part of it that is there before rounding, a norm; empty where inputs are matched.
  std::vector<double> initial;
  // Weights outside the grid: with nearest rounding |e_j| > (delta_j / 2)(1 + 1e-6) beyond the
  // outermost code, with stochastic rounding targets beyond the outermost levels.
  std::vector<int32_t> clipped;
  // How far beyond the outermost cell (nearest) or level (stochastic) the worst target lay, in
  // steps; 0 without clipping.
  double worst_overshoot = 0;
  // For (B5): max delta_j^2 D_j over what did not clip, and sum |e_j| sqrt(D_j) over what did.
  // Empty unless rounding is stochastic with feedback.
  std::vector<double> widest;
  std::vector<double> clipped_reach;
  // Only where inputs are mismatched and the method has feedback.
  std::optional<InitialTerms> terms;
  std::optional<int32_t> bits_needed;
};

}  // namespace certiq::engine

#endif  // CERTIQ_ENGINE_METHODS_METHOD_H_
