// How far quadratic forms of sums may be from those of the tokens themselves, and forms in float64
// where that is too far or float32 would add to it.

#ifndef CERTIQ_ENGINE_GRAM_FORM_ROUNDING_H_
#define CERTIQ_ENGINE_GRAM_FORM_ROUNDING_H_

#include <cstddef>
#include <cstdint>
#include <functional>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "engine/gram/gram.h"
#include "engine/kernels/strip_matrix.h"
#include "engine/run_context.h"

namespace certiq::engine {

// Of |X w_r - X~ q_r|^2 for every row r, in units of X squared.
struct FormRounding {
  // (R1): at most so far is the form of the sums from that of the tokens as float32, evaluated in
  // float64 as EvaluateRows does it.
  std::vector<double> sums;
  // What float32 products in its evaluation lose if their errors do not cancel, and the share of an
  // error that this may be. Where massive tokens make up a form, few terms do, whose errors do not
  // average out.
  std::vector<double> float32;
  double float32_share = 0;
};

// Whether massive tokens (StatisticsAccumulator) make up most of a feature's sums: what float32
// does to W - Q or to sums then is more than what other tokens have.
bool HasMassiveTokens(const Statistics& statistics);

// (R1) for rows of `change` = W - Q; `weights` = W counts only where inputs are mismatched. The
// energies |X w|^2 are those of change = W. Costs 4 R N flops.
FormRounding RoundingOfForms(const Statistics& statistics, const StripMatrix& weights,
                             const StripMatrix& change, Executor& executor);

// Rows of W - Q in float64, in this order.
using ChangeOfRows =
    std::function<BasicStripMatrix<double>(const std::vector<int64_t>& rows, Executor& executor)>;

// Sets errors[r] = |X w_r - X~ q_r|^2 for these rows, in float64 throughout; less than zero where
// the sums are not those of any tokens, or by rounding. `weights` as above. Fails only by
// cancellation.
absl::Status EvaluateRows(const Statistics& statistics, const StripMatrix& weights,
                          const ChangeOfRows& change, const std::vector<int64_t>& rows, Phase phase,
                          const RunContext& context, std::vector<double>& errors);

// The type of the precondition that sums of no tokens fail.
inline constexpr char kImpossibleSums[] = "SUMS";

// Sets what is not above zero to its rounding: the error of the tokens is at most that. An error
// further below is one that no tokens have: FAILED_PRECONDITION (kImpossibleSums, subject
// "calibration_id"), whose sums were imported. REQUIRES: errors at most 0 come from EvaluateRows.
absl::Status LiftToRounding(const FormRounding& rounding, std::vector<double>& errors);

// Both for errors that were computed with float32 products: evaluates the rows again of which these
// may have lost too much, with `change` rounded to float32, and lifts. Returns the
// rounding.
absl::StatusOr<FormRounding> SettleErrors(const Statistics& statistics, const StripMatrix& weights,
                                          const StripMatrix& change, Phase phase,
                                          const RunContext& context, std::vector<double>& errors);

// Whether float32 products may have lost more than their share of row r's error.
bool LostByFloat32(const FormRounding& rounding, size_t r, double error);

}  // namespace certiq::engine

#endif  // CERTIQ_ENGINE_GRAM_FORM_ROUNDING_H_
