#include <algorithm>
#include <cmath>
#include <limits>

#include "absl/strings/str_cat.h"
#include "checks.h"

namespace certiq::verify {
namespace {

// trace(X~^T X~) / N over the rows that are no part of the held-out ones.
double FitUnit(const Layer& layer) {
  double trace = layer.gram.trace();
  if (layer.held_out_damping) trace -= layer.held_out.inputs().squaredNorm();
  return trace / static_cast<double>(layer.gram.rows());
}

// Whether lambda is a candidate of the spec, or one after some failed attempts.
bool IsCandidate(const v1::Damping& damping, double lambda, double unit) {
  for (const double ratio : damping.held_out().ladder()) {
    double candidate = ratio * unit;
    for (int attempt = 0; attempt < damping.max_attempts(); ++attempt) {
      if (std::abs(lambda / candidate - 1) <= kPromise) return true;
      candidate *= damping.factor();
    }
  }
  return false;
}

// Whether step i is one of those that count, which have all of the spec's searches, or one of the
// plain runs before them.
bool HasSearches(const v1::QuantizationSpec& spec, const v1::LadderStep& step) {
  return step.scale_trials() == std::max(1, spec.scale_trials()) && step.polish() == spec.polish();
}

bool IsPlain(const v1::LadderStep& step) { return step.scale_trials() == 1 && step.polish() == 0; }

// The ratio that the final run uses by (V2), or 0 for an empty ladder: that of the least error or,
// with climb, of the largest lambda whose error is within 2 % of it.
double CheckHeldOutDamping(const Evidence& evidence, VerificationReport& report) {
  const v1::Certificate& c = evidence.certificate;
  const double unit = FitUnit(evidence.layer);
  double least = std::numeric_limits<double>::infinity();
  bool ours = c.ladder_size() > 0;
  for (const v1::LadderStep& step : c.ladder()) {
    const bool counts = HasSearches(evidence.spec(), step);
    // What is run with all searches was run plainly before.
    const bool known = std::any_of(c.ladder().begin(), c.ladder().end(), [&](const auto& other) {
      return IsPlain(other) && std::abs(other.lambda() / step.lambda() - 1) < 1e-9;
    });
    ours = ours && (counts || IsPlain(step)) && known &&
           IsCandidate(evidence.spec().damping(), step.lambda(), unit);
    if (counts) least = std::min(least, step.held_out_relative_error());
  }
  const double within = evidence.spec().damping().held_out().climb() ? 1.02 : 1;
  double ratio = 0;
  double chosen = 0;
  for (const v1::LadderStep& step : c.ladder()) {
    if (!HasSearches(evidence.spec(), step)) continue;
    if (step.held_out_relative_error() > within * least) continue;
    // Among equal errors the first step counts.
    if (within == 1 && ratio > 0) continue;
    if (step.lambda() / unit <= ratio) continue;
    ratio = step.lambda() / unit;
    chosen = step.held_out_relative_error();
  }
  report.Claim("ladder[].lambda", ours,
               absl::StrCat(c.ladder_size(), " steps", ours ? ", multiples as the spec says" : ""));
  report.NotChecked("ladder[].held_out_relative_error",
                    "each needs a run of its own; only that of the chosen one is compared");
  report.OptionalClose("held_out_relative_error", c.has_held_out_relative_error(),
                       c.held_out_relative_error(), chosen, 1e-12);
  return ratio;
}

// (D1), (V2); negative where the spec names no rule.
double LambdaByRule(const Evidence& evidence, double held_out_ratio) {
  const v1::Damping& damping = evidence.spec().damping();
  const double unit = evidence.layer.gram.trace() / static_cast<double>(evidence.layer.gram.rows());
  switch (damping.rule_case()) {
    case v1::Damping::kRelativeTrace:
      return damping.relative_trace() * unit;
    case v1::Damping::kAbsolute:
      return damping.absolute();
    case v1::Damping::kRelativeSigmaMax:
      return damping.relative_sigma_max() * LargestEigenvalue(evidence.layer.gram);
    case v1::Damping::kHeldOut:
      return held_out_ratio * unit;
    case v1::Damping::RULE_NOT_SET:
      break;
  }
  return -1;
}

// (D2) the first attempt is what was asked for, each further one the factor times the one before,
// and only the last may have been accepted.
bool AttemptsFollow(const v1::Certificate& c, double unit) {
  const v1::Damping& damping = c.spec().damping();
  const bool quantized = c.outcome() == v1::OUTCOME_QUANTIZED;
  const auto& attempts = c.damping_attempts();
  if (attempts.empty() || attempts.size() > damping.max_attempts()) return false;
  if (!quantized && attempts.size() != damping.max_attempts()) return false;
  double expected = c.lambda_requested();
  for (int i = 0; i < attempts.size(); ++i) {
    const bool accepted = quantized && i + 1 == attempts.size();
    if ((attempts[i].cause() == v1::STABILITY_CAUSE_NONE) != accepted) return false;
    // 0 is followed by epsilon trace / N, from sums that are off by 1e-6.
    if (std::abs(attempts[i].lambda() - expected) > 1e-5 * expected) return false;
    expected = attempts[i].lambda() == 0 ? 0x1p-23 * unit : attempts[i].lambda() * damping.factor();
  }
  return true;
}

}  // namespace

void CheckDamping(const Evidence& evidence, VerificationReport& report) {
  const v1::Certificate& c = evidence.certificate;
  const bool nearest = evidence.spec().method() == v1::METHOD_NEAREST;
  const bool fell_back = c.outcome() == v1::OUTCOME_FELL_BACK_TO_NEAREST;
  report.Claim("outcome",
               c.outcome() == v1::OUTCOME_QUANTIZED ||
                   (fell_back && !nearest &&
                    evidence.spec().damping().on_failure() == v1::ON_FAILURE_NEAREST),
               v1::Outcome_Name(c.outcome()));
  if (nearest) {
    report.Claim("lambda_requested, lambda_used, damping_attempts, condition_estimate",
                 c.lambda_requested() == 0 && c.lambda_used() == 0 &&
                     c.damping_attempts().empty() && c.condition_estimate() == 0,
                 "none, since plain rounding has no damping");
  } else {
    double ratio = 0;
    if (evidence.layer.held_out_damping) ratio = CheckHeldOutDamping(evidence, report);
    const double asked = LambdaByRule(evidence, ratio);
    // Power iteration approaches sigma_max from below.
    const bool iterated = evidence.layer.gram.rows() > 1500 &&
                          evidence.spec().damping().rule_case() == v1::Damping::kRelativeSigmaMax;
    report.Close("lambda_requested", c.lambda_requested(), asked, iterated ? 5e-3 : kPromise);
    const double unit =
        evidence.layer.gram.trace() / static_cast<double>(evidence.layer.gram.rows());
    report.Claim("damping_attempts[].lambda", AttemptsFollow(c, unit),
                 absl::StrCat(c.damping_attempts_size(), " attempts"));
    report.NotChecked("damping_attempts[].detail",
                      "says in words what the service saw; so do the causes of failed attempts");
    const double used = fell_back || c.damping_attempts().empty()
                            ? 0
                            : c.damping_attempts(c.damping_attempts_size() - 1).lambda();
    report.Close("lambda_used", c.lambda_used(), used, 1e-12);
  }
  if (!evidence.layer.held_out_damping) {
    report.Claim("ladder", c.ladder().empty(), absl::StrCat(c.ladder_size(), " steps"));
  }
  if (!evidence.feedback.has_value()) return;
  const Feedback& f = *evidence.feedback;
  // Higham's estimate is never above the truth and rarely far below.
  const double condition = OneNormCondition(f.h, f.inverse_u, f.factor.d);
  report.Number("condition_estimate", c.condition_estimate(), condition,
                {0.1 * condition, (1 + 1e-3 + 2 * f.slack) * condition});
  if (f.slack > kPromise) {
    report.NotChecked(
        "digits", absl::StrCat("H is so ill-conditioned that sums of float32 products leave what "
                               "rests on its factor uncertain by ",
                               2 * f.slack, "; comparisons allow for that"));
  }
}

}  // namespace certiq::verify
