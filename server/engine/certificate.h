// Certificate of a quantized layer: errors, bounds, and what they rest on.

#ifndef CERTIQ_ENGINE_CERTIFICATE_H_
#define CERTIQ_ENGINE_CERTIFICATE_H_

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "engine/linalg/damped_factor.h"
#include "engine/spec.h"

namespace certiq::engine {

enum class Outcome { kQuantized, kFellBackToNearest };

// What refinement did, over all rows.
struct RefineOutcome {
  // The most passes that a row took.
  int32_t passes = 0;
  // Damped squared error of the method's own result.
  double damped_before = 0;
};

// Groups whose scale or levels their type is too coarse for (QuantParams::vanishes).
struct Underflow {
  int64_t groups = 0;
  // Rows that have such a group, and the first of them, at most kNamed.
  int64_t rows = 0;
  std::vector<int64_t> first_rows;

  static constexpr int64_t kNamed = 16;
};

// One run of the damping search (V2).
struct DampingCandidate {
  double lambda = 0;
  double held_out_relative_error = 0;
  // What the run had of the spec's trials and passes.
  int32_t scale_trials = 1;
  int32_t polish = 0;
};

// Seconds of wall clock the engine spent.
struct EngineSeconds {
  double factor = 0;
  double round = 0;
  double certify = 0;
  double reference = 0;
  double pack = 0;
};

// The engine's part of the Certificate message; every field is explained
// there (certificate.proto), with its formula.
struct LayerCertificate {
  int64_t rows = 0;
  int64_t features = 0;
  int64_t tokens = 0;
  ResolvedSpec spec;
  Outcome outcome = Outcome::kQuantized;
  std::vector<std::string> warnings;
  double bits_per_weight = 0;
  // Unset where nothing was refined.
  std::optional<RefineOutcome> polish;

  double lambda_requested = 0;
  double lambda_used = 0;
  std::vector<DampingAttempt> damping_attempts;
  // Failed attempts in the damping search, which `damping_attempts` does not have (V2).
  std::vector<StabilityCause> search_failures;
  double condition_estimate = 0;

  double squared_error = 0;
  double damped_squared_error = 0;
  double reference_energy = 0;
  double relative_error = 0;
  std::optional<double> nearest_relative_error;
  double l2_bound = 0;
  double identity_residual = 0;
  double c2 = 0;
  double c_inf = 0;
  // One a row; kept even if the spec's per_row is off.
  std::vector<double> row_error;
  std::vector<double> row_bound;
  // (R1), squared norms.
  double squared_error_rounding = 0;
  double reference_energy_rounding = 0;
  std::vector<double> row_rounding;

  int64_t clipped_weights = 0;
  int64_t clipped_rows = 0;
  double worst_overshoot = 0;
  int64_t dead_features = 0;
  // Unset where there is none.
  std::optional<Underflow> underflow;

  std::optional<double> predicted_squared_error;
  std::optional<double> rate_gap_bits;
  std::optional<double> linf_bound;
  std::optional<double> linf_probability;
  std::optional<int32_t> bits_needed;

  int64_t held_out_tokens = 0;
  std::optional<double> held_out_relative_error;
  // Of plain rounding, on the same rows and tokens.
  std::optional<double> held_out_nearest_relative_error;
  // Rows that it, and the damping search, was measured on.
  int64_t held_out_rows = 0;
  std::vector<DampingCandidate> damping_candidates;

  std::optional<double> qronos_initial;
  std::optional<double> optq_initial;
  std::optional<double> floor;

  EngineSeconds seconds;
  // Floating point operations by the formulas' count: statistics are the
  // caller's.
  double factor_flops = 0;
  double round_flops = 0;
};

}  // namespace certiq::engine

#endif  // CERTIQ_ENGINE_CERTIFICATE_H_
