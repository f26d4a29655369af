#include "engine/spec.h"

#include <gtest/gtest.h>

#include <cmath>
#include <functional>

#include "base/status.h"

namespace certiq::engine {
namespace {

TEST(SpecTest, DefaultsAreTheContracts) {
  const auto spec = ResolveSpec({});
  ASSERT_TRUE(spec.ok());
  EXPECT_EQ(spec->method, Method::kOptq);
  EXPECT_EQ(spec->bits, 4);
  EXPECT_TRUE(spec->symmetric);
  EXPECT_EQ(spec->group_size, 0);
  EXPECT_EQ(spec->scale_dtype, DType::kF32);
  EXPECT_EQ(spec->damping_rule, DampingRule::kRelativeTrace);
  EXPECT_EQ(spec->damping_value, 0.01);
  EXPECT_EQ(spec->max_attempts, 5);
  EXPECT_EQ(spec->damping_factor, 10);
  EXPECT_EQ(spec->on_failure, OnFailure::kFail);
}

TEST(SpecTest, GroupsOfColumns) {
  QuantizationSpec spec;
  spec.group_size = 8;
  const auto resolved = ResolveSpec(spec);
  ASSERT_TRUE(resolved.ok());
  EXPECT_EQ(resolved->Groups(17), 3);
  EXPECT_EQ(resolved->GroupOf(7), 0);
  EXPECT_EQ(resolved->GroupOf(16), 2);
}

struct BadSpec {
  const char* field;
  std::function<void(QuantizationSpec&)> spoil;
};

TEST(SpecTest, RefusesEveryBadValueByItsField) {
  const BadSpec bad[] = {
      {"spec.bits", [](auto& s) { s.bits = 1; }},
      {"spec.bits", [](auto& s) { s.bits = 9; }},
      {"spec.group_size", [](auto& s) { s.group_size = -1; }},
      {"spec.group_size", [](auto& s) { s.group_size = 1; }},
      {"spec.group_size", [](auto& s) { s.group_size = 7; }},
      {"spec.scale_dtype", [](auto& s) { s.scale_dtype = DType::kI32; }},
      {"spec.damping.relative_trace", [](auto& s) { s.damping_value = -1; }},
      {"spec.damping.absolute",
       [](auto& s) {
         s.damping_rule = DampingRule::kAbsolute;
         s.damping_value = NAN;
       }},
      {"spec.damping.max_attempts", [](auto& s) { s.max_attempts = 0; }},
      {"spec.damping.max_attempts", [](auto& s) { s.max_attempts = 21; }},
      {"spec.damping.factor", [](auto& s) { s.damping_factor = 1; }},
      {"spec.scale_trials", [](auto& s) { s.scale_trials = 0; }},
      {"spec.scale_trials", [](auto& s) { s.scale_trials = 33; }},
      {"spec.scale_trials",
       [](auto& s) {
         s.scale_trials = 2;
         s.method = Method::kNearest;
       }},
      {"spec.scale_trials",
       [](auto& s) {
         s.scale_trials = 2;
         s.grid.emplace().scales = {1};
       }},
      {"spec.signed_scales", [](auto& s) { s.signed_scales = true; }},
      {"spec.signed_scales",
       [](auto& s) {
         s.signed_scales = true;
         s.scale = ScaleRule::kMse;
         s.symmetric = false;
       }},
      {"spec.signed_scales",
       [](auto& s) {
         s.signed_scales = true;
         s.grid.emplace().scales = {1};
       }},
      {"spec.polish", [](auto& s) { s.polish = -1; }},
      {"spec.polish", [](auto& s) { s.polish = 65; }},
      {"spec.polish",
       [](auto& s) {
         s.polish = 1;
         s.rounding = Rounding::kStochastic;
       }},
      {"spec.damping.held_out.ladder",
       [](auto& s) {
         s.damping_ladder = {0.1, 0.01};
         s.damping_climb = true;
       }},
      {"spec.certificate.failure_probability", [](auto& s) { s.failure_probability = 0; }},
  };
  for (const BadSpec& b : bad) {
    QuantizationSpec spec;
    b.spoil(spec);
    const auto resolved = ResolveSpec(spec);
    EXPECT_EQ(resolved.status().code(), absl::StatusCode::kInvalidArgument) << b.field;
    EXPECT_EQ(base::FieldOf(resolved.status()), b.field);
  }
}

// A preset fills what is unset and nothing else, and what it fills can be sent again.
TEST(SpecTest, PresetsFillWhatIsUnset) {
  for (const Quality quality : {Quality::kFast, Quality::kBalanced, Quality::kBest}) {
    QuantizationSpec spec;
    spec.quality = quality;
    const auto filled = ResolveSpec(spec);
    ASSERT_TRUE(filled.ok()) << filled.status();
    EXPECT_EQ(filled->quality, quality);
    EXPECT_EQ(filled->order, Order::kDecreasingNorm);
    EXPECT_EQ(filled->NeedsHeldOut(), quality != Quality::kFast);
    EXPECT_EQ(filled->polish > 0, quality == Quality::kBest);
    EXPECT_TRUE(filled->signed_scales);

    spec.order = Order::kNatural;
    spec.scale = ScaleRule::kAbsmax;
    spec.damping_rule = DampingRule::kAbsolute;
    spec.damping_value = 7;
    spec.scale_trials = 2;
    spec.polish = 1;
    const auto kept = ResolveSpec(spec);
    ASSERT_TRUE(kept.ok()) << kept.status();
    EXPECT_EQ(kept->order, Order::kNatural);
    EXPECT_EQ(kept->scale, ScaleRule::kAbsmax);
    EXPECT_FALSE(kept->signed_scales);
    EXPECT_EQ(kept->damping_rule, DampingRule::kAbsolute);
    EXPECT_EQ(kept->damping_value, 7);
    EXPECT_EQ(kept->scale_trials, 2);
    EXPECT_EQ(kept->polish, 1);
  }
}

// Whatever a method, a grid or a rounding has no use for is not filled in.
TEST(SpecTest, PresetsFitEveryMethodGridAndRounding) {
  for (const Quality quality : {Quality::kFast, Quality::kBalanced, Quality::kBest}) {
    for (const Method method : {Method::kNearest, Method::kOptq, Method::kQronos}) {
      for (const Rounding rounding : {Rounding::kNearest, Rounding::kStochastic}) {
        for (const bool given : {false, true}) {
          QuantizationSpec spec;
          spec.quality = quality;
          spec.method = method;
          spec.rounding = rounding;
          if (given) spec.grid.emplace().scales = {1};
          EXPECT_TRUE(ResolveSpec(spec).ok()) << ResolveSpec(spec).status();
        }
      }
    }
  }
}

}  // namespace
}  // namespace certiq::engine
