// The ladder of damping: climbed, and with trials and polish.

#include "engine/damping/damping_search.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <limits>
#include <vector>

#include "tests/engine/problems.h"

namespace certiq::engine {
namespace {

using testing::Inputs;
using testing::MakeLayer;
using testing::RandomLayer;

RandomLayer WithHeldOut(int64_t rows, uint64_t seed) {
  RandomLayer problem = MakeLayer(90, 60, rows, Inputs::kCorrelated, seed);
  problem.held_x = MakeLayer(200, 60, 1, Inputs::kCorrelated, seed + 1).x;
  return problem;
}

// Climbing a ladder ends at a step that neither neighbour betters, and says of each step what the
// whole ladder says.
TEST(LadderTest, ClimbsToAStepThatNoNeighbourBetters) {
  for (uint64_t seed = 900; seed < 906; ++seed) {
    const RandomLayer problem = WithHeldOut(12, seed);
    ResolvedSpec spec;
    spec.bits = 3;
    spec.damping_rule = DampingRule::kHeldOut;
    spec.damping_candidates = {1e-4, 1e-3, 0.003, 0.01, 0.03, 0.1, 0.3, 1, 3};
    const auto all = testing::Quantize(problem, spec);
    spec.damping_climb = true;
    const auto climbed = testing::Quantize(problem, spec);
    ASSERT_TRUE(all.ok() && climbed.ok());
    const std::vector<DampingCandidate>& steps = all->certificate.damping_candidates;
    ASSERT_EQ(steps.size(), 9u);
    EXPECT_GE(climbed->certificate.damping_candidates.size(), 3u);
    const double found = *climbed->certificate.held_out_relative_error;
    bool known = false;
    for (const DampingCandidate& step : climbed->certificate.damping_candidates) {
      const auto same =
          std::find_if(steps.begin(), steps.end(),
                       [&](const DampingCandidate& other) { return other.lambda == step.lambda; });
      ASSERT_NE(same, steps.end());
      EXPECT_EQ(same->held_out_relative_error, step.held_out_relative_error);
      EXPECT_LE(found, 1.02 * step.held_out_relative_error);
      if (step.held_out_relative_error != found) continue;
      known = true;
      // The next larger lambda may be better, by no more than what counts as equal.
      if (same != steps.begin()) {
        EXPECT_LE(found, 1.02 * (same - 1)->held_out_relative_error);
      }
      if (same + 1 != steps.end()) {
        EXPECT_GT((same + 1)->held_out_relative_error, found);
      }
    }
    EXPECT_TRUE(known);
  }
}

// With trials or polish the steps that count have them, and are what such a run gives alone.
TEST(LadderTest, JudgesTrialsAndPolishBesideTheBestPlainStep) {
  const RandomLayer problem = WithHeldOut(12, 911);
  ResolvedSpec spec;
  spec.bits = 3;
  spec.damping_rule = DampingRule::kHeldOut;
  spec.damping_candidates = {0.001, 0.03, 0.3, 3};
  spec.scale_trials = 3;
  spec.polish = 2;
  const auto layer = testing::Quantize(problem, spec);
  ASSERT_TRUE(layer.ok()) << layer.status();
  const LayerCertificate& c = layer->certificate;
  double least = std::numeric_limits<double>::infinity();
  int plain = 0;
  int whole = 0;
  for (const DampingCandidate& step : c.damping_candidates) {
    if (step.scale_trials == 1 && step.polish == 0) {
      ++plain;
      continue;
    }
    ++whole;
    EXPECT_EQ(step.scale_trials, 3);
    EXPECT_EQ(step.polish, 2);
    least = std::min(least, step.held_out_relative_error);
    ResolvedSpec one = spec;
    one.damping_rule = DampingRule::kAbsolute;
    one.damping_value = step.lambda;
    const auto alone = testing::Quantize(problem, one);
    ASSERT_TRUE(alone.ok());
    EXPECT_NEAR(*alone->certificate.held_out_relative_error, step.held_out_relative_error,
                1e-9 * step.held_out_relative_error);
  }
  EXPECT_EQ(plain, 4);
  // The best of the plain steps and the next larger, where there is one.
  EXPECT_GE(whole, 1);
  EXPECT_LE(whole, 2);
  EXPECT_EQ(c.held_out_relative_error, least);
}

}  // namespace
}  // namespace certiq::engine
