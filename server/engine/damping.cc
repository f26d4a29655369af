#include "engine/damping.h"

#include <utility>

#include "absl/strings/str_cat.h"

namespace certiq::engine {
namespace {

double MeanDiagonal(const UpperPanels<double>& gram) {
  double trace = 0;
  for (int64_t i = 0; i < gram.size(); ++i) trace += gram.at(i, i);
  return trace / static_cast<double>(gram.size());
}

}  // namespace

double RequestedLambda(const ResolvedSpec& spec, const Statistics& statistics) {
  if (spec.damping_rule == DampingRule::kAbsolute) return spec.damping_value;
  return spec.damping_value * MeanDiagonal(statistics.gram);
}

absl::StatusOr<DampedFactor> FactorWithDamping(const ResolvedSpec& spec,
                                               const Statistics& statistics,
                                               const std::vector<bool>& dead,
                                               const RunContext& context) {
  DampedFactor result;
  result.lambda_requested = RequestedLambda(spec, statistics);
  double lambda = result.lambda_requested;
  for (int32_t attempt = 0; attempt < spec.max_attempts; ++attempt) {
    absl::StatusOr<FactorAttempt> tried = FactorDamped(statistics.gram, dead, lambda, context);
    if (!tried.ok()) return tried.status();
    result.lambda_used = lambda;
    result.attempts.push_back({lambda, tried->cause, std::move(tried->detail)});
    if (tried->cause == StabilityCause::kNone) {
      result.factor = std::move(tried->factor);
      return result;
    }
    lambda = lambda == 0 ? 0x1p-52 * MeanDiagonal(statistics.gram) : lambda * spec.damping_factor;
  }
  return result;
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
