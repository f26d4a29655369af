// One run of a method with one lambda, whatever the method.

#ifndef CERTIQ_ENGINE_METHODS_RUN_METHOD_H_
#define CERTIQ_ENGINE_METHODS_RUN_METHOD_H_

#include <cstdint>
#include <memory>
#include <optional>
#include <vector>

#include "absl/status/statusor.h"
#include "engine/certificate.h"
#include "engine/damping/damping.h"
#include "engine/linalg/quadratic_form.h"
#include "engine/methods/method.h"
#include "engine/scales/qparams.h"

namespace certiq::engine {

// A layer in the order it is worked on.
struct WorkingLayer {
  // Element i: the original feature at step i; empty: natural.
  std::vector<int64_t> order;
  std::vector<bool> dead;
  SharedStatistics sums;
  // Where factors of these sums are kept; null: nowhere. What they are in it: see FactorKey.
  FactorCache* factors = nullptr;
  bool with_held_out = false;
  // W as it came, and with zeros at dead features (empty where there are none: use reference).
  StripMatrix reference;
  StripMatrix zeroed;
  // Where inputs are mismatched: of `reference`, once a method has needed it.
  std::optional<InitialError> initial;

  const Statistics& statistics() const { return *sums; }
  const StripMatrix& weights() const { return zeroed.rows() > 0 ? zeroed : reference; }
};

// Finds order and dead features and brings everything into that order.
WorkingLayer MakeWorkingLayer(const ResolvedSpec& spec, SharedStatistics sums, StripMatrix weights,
                              const RunContext& context);

struct Fit {
  Outcome outcome = Outcome::kQuantized;
  // Without attempts for NEAREST; never null.
  SharedFactor damping = std::make_shared<const DampedFactor>();
  // Factorisations that this run made itself.
  int64_t factorisations = 0;
  Grid grid;
  // Of the final codes.
  MethodOutput output;
  std::optional<PolishOutcome> polish;
};

// What a fit is for.
struct FitUse {
  // Whether a certificate follows: without, the bits needed (B6) are left out.
  bool certified = true;
  // What is of no use afterwards, so that the fit can make room: U, where the factor is its own,
  // and W and its initial error, which it takes from `layer` where its errors can be told without.
  bool consume_factor = false;
  bool consume_weights = false;
};

// Damps and factors, fills the grid, runs the spec's method. When every
// damping attempt failed: NEAREST where the spec says so, else FAILED_PRECONDITION of type
// "DAMPING" with the attempts, causes attached (status.h). Seconds of the factor and round phases
// are added to `seconds`.
absl::StatusOr<Fit> RunFit(const ResolvedSpec& spec, WorkingLayer& layer, double lambda, FitUse use,
                           const RunContext& context, EngineSeconds& seconds);

}  // namespace certiq::engine

#endif  // CERTIQ_ENGINE_METHODS_RUN_METHOD_H_
