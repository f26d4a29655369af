#include "engine/linalg/damped_factor.h"

#include <cmath>
#include <utility>

#include "absl/strings/str_cat.h"
#include "base/status.h"
#include "base/status_macros.h"
#include "engine/linalg/sigma_max.h"

namespace certiq::engine {
namespace {

// From lambda = 0 (D2): float32's epsilon, since products of activations are float32. Less would
// be lost in their noise.
constexpr double kFirstRetry = 0x1p-23;

}  // namespace

double MeanDiagonal(const UpperTriangle<double>& gram) {
  double trace = 0;
  for (int64_t i = 0; i < gram.size(); ++i) trace += gram.at(i, i);
  return trace / static_cast<double>(gram.size());
}

absl::StatusOr<double> LambdaOf(DampingRule rule, double value, const UpperTriangle<double>& gram,
                                const RunContext& context) {
  switch (rule) {
    case DampingRule::kAbsolute:
      return value;
    case DampingRule::kRelativeSigmaMax: {
      ASSIGN_OR_RETURN(const double largest, LargestEigenvalue(gram, context));
      return value * largest;
    }
    case DampingRule::kRelativeTrace:
    case DampingRule::kHeldOut:
      break;
  }
  return value * MeanDiagonal(gram);
}

absl::StatusOr<DampedFactor> FactorWithDamping(const ResolvedSpec& spec, double lambda,
                                               const UpperTriangle<double>& gram,
                                               const std::vector<bool>& dead, FactorUse use,
                                               const RunContext& context) {
  DampedFactor result;
  result.lambda_requested = lambda;
  for (int32_t attempt = 0; attempt < spec.max_attempts; ++attempt) {
    ASSIGN_OR_RETURN(FactorAttempt tried, FactorDamped(gram, dead, lambda, use, context));
    result.lambda_used = lambda;
    result.attempts.push_back({lambda, tried.cause, std::move(tried.detail)});
    if (tried.cause == StabilityCause::kNone) {
      result.factor = std::move(tried.factor);
      return result;
    }
    lambda = lambda == 0 ? kFirstRetry * MeanDiagonal(gram) : lambda * spec.damping_factor;
    // Past float64 there is nothing left to try.
    if (!std::isfinite(lambda)) break;
  }
  return result;
}

const char* DampingField(DampingRule rule) {
  switch (rule) {
    case DampingRule::kRelativeTrace:
      return "spec.damping.relative_trace";
    case DampingRule::kAbsolute:
      return "spec.damping.absolute";
    case DampingRule::kRelativeSigmaMax:
      return "spec.damping.relative_sigma_max";
    case DampingRule::kHeldOut:
      return "spec.damping.held_out.ladder";
  }
  return "spec.damping";
}

absl::Status TooLarge(const ResolvedSpec& spec, double lambda, bool lambda_alone, int64_t row) {
  const std::string place = row < 0 ? "" : absl::StrCat(" in row ", row);
  if (lambda_alone) {
    return base::InvalidField(
        DampingField(spec.damping_rule.value_or(DampingRule::kRelativeTrace)),
        absl::StrCat("expected a lambda with which lambda |W - Q|^2 and its bound stay within "
                     "float64, got lambda = ",
                     lambda, " from these activations, which leaves it", place));
  }
  return base::InvalidField(
      "weight", absl::StrCat("the weights", place, " are so large that rounding left the range of ",
                             Name(spec.LevelType()),
                             ", or squared errors with these activations that of float64"));
}

std::string DescribeAttempts(const std::vector<DampingAttempt>& attempts) {
  std::string text;
  for (const DampingAttempt& attempt : attempts) {
    absl::StrAppend(&text, text.empty() ? "" : "; ", "lambda ", attempt.lambda, ": ",
                    attempt.detail);
  }
  return text;
}

}  // namespace certiq::engine
