#include "contract/resolve_spec.h"

#include <gtest/gtest.h>

#include <cmath>
#include <cstdint>
#include <functional>
#include <limits>
#include <vector>

#include "base/status.h"

namespace certiq::server {
namespace {

using engine::DampingRule;

TEST(ResolveSpecTest, DefaultsAreTheContracts) {
  const auto spec = ResolveSpec(v1::QuantizationSpec());
  ASSERT_TRUE(spec.ok());
  EXPECT_EQ(spec->method, engine::Method::kOptq);
  EXPECT_EQ(spec->bits, 4);
  EXPECT_TRUE(spec->symmetric);
  EXPECT_EQ(spec->group_size, 0);
  EXPECT_EQ(spec->scale_dtype, engine::DType::kF32);
  EXPECT_EQ(spec->grid, nullptr);
  EXPECT_EQ(spec->group_scales, engine::GroupScales::kStatic);
  EXPECT_EQ(spec->scale, engine::ScaleRule::kAbsmax);
  EXPECT_FALSE(spec->scale_objective.has_value());
  EXPECT_EQ(spec->scale_passes, 0);
  EXPECT_FALSE(spec->signed_scales);
  EXPECT_EQ(spec->scale_trials, 1);
  EXPECT_EQ(spec->polish, 0);
  EXPECT_EQ(spec->rounding, engine::Rounding::kNearest);
  EXPECT_EQ(spec->seed, 0U);
  EXPECT_EQ(spec->order, engine::Order::kNatural);
  EXPECT_EQ(spec->damping_rule, DampingRule::kRelativeTrace);
  EXPECT_EQ(spec->damping_value, 0.01);
  EXPECT_EQ(spec->damping_candidates, (std::vector{0.001, 0.01, 0.03, 0.1, 0.3, 1.0}));
  EXPECT_FALSE(spec->damping_climb);
  EXPECT_EQ(spec->max_attempts, 5);
  EXPECT_EQ(spec->damping_factor, 10);
  EXPECT_EQ(spec->on_failure, engine::OnFailure::kFail);
  EXPECT_EQ(spec->format, engine::Format::kDenseF32);
  EXPECT_FALSE(spec->quality.has_value());
  EXPECT_TRUE(spec->per_row);
  EXPECT_EQ(spec->failure_probability, 1e-3);
  EXPECT_FALSE(spec->compare_nearest);
  EXPECT_EQ(spec->min_tokens, 1);
}

// The engine's own defaults are these, so that its tests need no message.
TEST(ResolveSpecTest, TheEngineHasTheSameDefaults) {
  EXPECT_EQ(ToProto(engine::ResolvedSpec()).SerializeAsString(),
            ToProto(*ResolveSpec(v1::QuantizationSpec())).SerializeAsString());
}

TEST(ResolveSpecTest, GroupsOfColumns) {
  v1::QuantizationSpec spec;
  spec.set_group_size(8);
  const auto resolved = ResolveSpec(spec);
  ASSERT_TRUE(resolved.ok());
  EXPECT_EQ(resolved->Groups(17), 3);
  EXPECT_EQ(resolved->GroupOf(7), 0);
  EXPECT_EQ(resolved->GroupOf(16), 2);
}

TEST(ResolveSpecTest, EveryFieldArrives) {
  v1::QuantizationSpec spec;
  spec.set_method(v1::METHOD_NEAREST);
  spec.set_bits(3);
  spec.set_symmetric(false);
  spec.set_group_size(16);
  spec.set_scale_dtype(v1::DATA_TYPE_F16);
  spec.set_group_scales(v1::GROUP_SCALES_STATIC);
  spec.set_scale(v1::SCALE_RULE_PISO);
  spec.set_scale_objective(v1::SCALE_OBJECTIVE_INPUTS);
  spec.set_scale_passes(2);
  spec.set_signed_scales(false);
  spec.set_polish(2);
  spec.mutable_grid()->add_scales(0.5F);
  spec.mutable_grid()->add_zero_points(4);
  spec.mutable_grid()->set_lowest_code(1);
  spec.set_seed(~uint64_t{0});
  spec.set_order(v1::ORDER_DECREASING_NORM);
  spec.mutable_damping()->mutable_held_out()->add_ladder(0.25);
  spec.mutable_damping()->mutable_held_out()->set_climb(true);
  spec.mutable_damping()->set_max_attempts(7);
  spec.mutable_damping()->set_factor(3);
  spec.mutable_damping()->set_on_failure(v1::ON_FAILURE_NEAREST);
  spec.set_format(v1::FORMAT_GPTQ_V2);
  spec.set_quality(v1::QUALITY_BEST);
  spec.set_min_tokens(9);
  spec.mutable_certificate()->set_per_row(false);
  spec.mutable_certificate()->set_failure_probability(0.5);
  spec.mutable_certificate()->set_compare_nearest(true);
  const auto out = ResolveSpec(spec);
  ASSERT_TRUE(out.ok()) << out.status();
  EXPECT_EQ(out->method, engine::Method::kNearest);
  EXPECT_EQ(out->bits, 3);
  EXPECT_FALSE(out->symmetric);
  EXPECT_EQ(out->group_size, 16);
  EXPECT_EQ(out->scale_dtype, engine::DType::kF16);
  ASSERT_NE(out->grid, nullptr);
  EXPECT_EQ(out->grid->scales, std::vector{0.5F});
  EXPECT_EQ(out->grid->zero_points, std::vector{4});
  EXPECT_EQ(out->grid->lowest_code, 1);
  EXPECT_FALSE(out->grid->highest_code.has_value());
  EXPECT_EQ(out->group_scales, engine::GroupScales::kStatic);
  EXPECT_EQ(out->scale, engine::ScaleRule::kPiso);
  EXPECT_EQ(out->scale_objective, engine::ScaleObjective::kInputs);
  EXPECT_EQ(out->scale_passes, 2);
  EXPECT_EQ(out->scale_trials, 1);
  EXPECT_FALSE(out->signed_scales);
  EXPECT_EQ(out->polish, 2);
  EXPECT_EQ(out->rounding, engine::Rounding::kNearest);
  EXPECT_EQ(out->seed, ~uint64_t{0});
  EXPECT_EQ(out->order, engine::Order::kDecreasingNorm);
  EXPECT_EQ(out->damping_rule, DampingRule::kHeldOut);
  EXPECT_EQ(out->damping_candidates, std::vector{0.25});
  EXPECT_TRUE(out->damping_climb);
  EXPECT_EQ(out->max_attempts, 7);
  EXPECT_EQ(out->damping_factor, 3);
  EXPECT_EQ(out->on_failure, engine::OnFailure::kNearest);
  EXPECT_EQ(out->format, engine::Format::kGptqV2);
  EXPECT_EQ(out->quality, engine::Quality::kBest);
  EXPECT_EQ(out->min_tokens, 9);
  EXPECT_FALSE(out->per_row);
  EXPECT_EQ(out->failure_probability, 0.5);
  EXPECT_TRUE(out->compare_nearest);

  v1::QuantizationSpec sweep;
  sweep.set_method(v1::METHOD_QRONOS);
  sweep.set_group_size(32);
  sweep.set_group_scales(v1::GROUP_SCALES_DYNAMIC);
  sweep.set_scale(v1::SCALE_RULE_MSE);
  sweep.set_scale_trials(3);
  sweep.set_signed_scales(true);
  sweep.set_rounding(v1::ROUNDING_STOCHASTIC);
  const auto swept = ResolveSpec(sweep);
  ASSERT_TRUE(swept.ok()) << swept.status();
  EXPECT_EQ(swept->method, engine::Method::kQronos);
  EXPECT_EQ(swept->group_scales, engine::GroupScales::kDynamic);
  EXPECT_EQ(swept->scale_trials, 3);
  EXPECT_TRUE(swept->signed_scales);
  EXPECT_EQ(swept->rounding, engine::Rounding::kStochastic);
}

TEST(ResolveSpecTest, DampingRules) {
  v1::QuantizationSpec spec;
  spec.mutable_damping()->set_relative_trace(0.5);
  EXPECT_EQ(ResolveSpec(spec)->damping_rule, DampingRule::kRelativeTrace);
  EXPECT_EQ(ResolveSpec(spec)->damping_value, 0.5);
  spec.mutable_damping()->set_absolute(0);
  EXPECT_EQ(ResolveSpec(spec)->damping_rule, DampingRule::kAbsolute);
  EXPECT_EQ(ResolveSpec(spec)->damping_value, 0.0);
  spec.mutable_damping()->set_relative_sigma_max(1e-6);
  EXPECT_EQ(ResolveSpec(spec)->damping_rule, DampingRule::kRelativeSigmaMax);
  spec.mutable_damping()->mutable_held_out();
  EXPECT_EQ(ResolveSpec(spec)->damping_rule, DampingRule::kHeldOut);
  EXPECT_EQ(ResolveSpec(spec)->damping_candidates.size(), 6U);
  spec.mutable_damping()->clear_rule();
  EXPECT_EQ(ResolveSpec(spec)->damping_rule, DampingRule::kRelativeTrace);
  spec.set_method(v1::METHOD_QRONOS);
  EXPECT_EQ(ResolveSpec(spec)->damping_rule, std::nullopt) << "Qronos decides later";
}

TEST(ResolveSpecTest, PisoHasItsOwnDefaults) {
  v1::QuantizationSpec spec;
  spec.set_scale(v1::SCALE_RULE_PISO);
  EXPECT_EQ(ResolveSpec(spec)->scale_objective, engine::ScaleObjective::kQuantizedInputs);
  EXPECT_EQ(ResolveSpec(spec)->scale_passes, 0);
  spec.set_method(v1::METHOD_NEAREST);
  EXPECT_EQ(ResolveSpec(spec)->scale_objective, engine::ScaleObjective::kMixed);
  EXPECT_EQ(ResolveSpec(spec)->scale_passes, 0);
  spec.set_group_size(16);
  EXPECT_EQ(ResolveSpec(spec)->scale_passes, 3);
}

struct BadSpec {
  const char* field;
  std::function<void(v1::QuantizationSpec&)> spoil;
};

void ExpectRefused(const std::vector<BadSpec>& bad, const v1::QuantizationSpec& start) {
  for (const BadSpec& b : bad) {
    v1::QuantizationSpec spec = start;
    b.spoil(spec);
    const auto resolved = ResolveSpec(spec);
    EXPECT_EQ(resolved.status().code(), absl::StatusCode::kInvalidArgument) << b.field;
    EXPECT_EQ(base::FieldOf(resolved.status()), b.field) << resolved.status();
  }
}

TEST(ResolveSpecTest, RefusesEveryBadValueByItsField) {
  ExpectRefused(
      {
          {"spec.method", [](auto& s) { s.set_method(v1::METHOD_UNSPECIFIED); }},
          {"spec.damping.on_failure",
           [](auto& s) { s.mutable_damping()->set_on_failure(v1::ON_FAILURE_UNSPECIFIED); }},
          {"spec.quality",
           [](auto& s) {
             s.set_quality(v1::QUALITY_UNSPECIFIED);
             s.set_bits(9);
           }},
          {"spec.bits", [](auto& s) { s.set_bits(1); }},
          {"spec.bits", [](auto& s) { s.set_bits(9); }},
          {"spec.group_size", [](auto& s) { s.set_group_size(-1); }},
          {"spec.group_size", [](auto& s) { s.set_group_size(1); }},
          {"spec.group_size", [](auto& s) { s.set_group_size(7); }},
          {"spec.scale_dtype", [](auto& s) { s.set_scale_dtype(v1::DATA_TYPE_I32); }},
          {"spec.damping.relative_trace",
           [](auto& s) { s.mutable_damping()->set_relative_trace(-1); }},
          {"spec.damping.absolute", [](auto& s) { s.mutable_damping()->set_absolute(NAN); }},
          {"spec.damping.relative_sigma_max",
           [](auto& s) { s.mutable_damping()->set_relative_sigma_max(INFINITY); }},
          {"spec.damping.max_attempts", [](auto& s) { s.mutable_damping()->set_max_attempts(0); }},
          {"spec.damping.max_attempts", [](auto& s) { s.mutable_damping()->set_max_attempts(21); }},
          {"spec.damping.factor", [](auto& s) { s.mutable_damping()->set_factor(1); }},
          {"spec.scale_trials", [](auto& s) { s.set_scale_trials(0); }},
          {"spec.scale_trials", [](auto& s) { s.set_scale_trials(33); }},
          {"spec.scale_trials",
           [](auto& s) {
             s.set_scale_trials(2);
             s.set_method(v1::METHOD_NEAREST);
           }},
          {"spec.scale_trials",
           [](auto& s) {
             s.set_scale_trials(2);
             s.mutable_grid()->add_scales(1);
           }},
          {"spec.signed_scales", [](auto& s) { s.set_signed_scales(true); }},
          {"spec.signed_scales",
           [](auto& s) {
             s.set_signed_scales(true);
             s.set_scale(v1::SCALE_RULE_MSE);
             s.set_symmetric(false);
           }},
          {"spec.signed_scales",
           [](auto& s) {
             s.set_signed_scales(true);
             s.mutable_grid()->add_scales(1);
           }},
          {"spec.polish", [](auto& s) { s.set_polish(-1); }},
          {"spec.polish", [](auto& s) { s.set_polish(65); }},
          {"spec.polish",
           [](auto& s) {
             s.set_polish(1);
             s.set_rounding(v1::ROUNDING_STOCHASTIC);
           }},
          {"spec.damping.held_out.ladder",
           [](auto& s) {
             auto& held_out = *s.mutable_damping()->mutable_held_out();
             held_out.add_ladder(0.1);
             held_out.add_ladder(0.01);
             held_out.set_climb(true);
           }},
          {"spec.damping.held_out.ladder",
           [](auto& s) { s.mutable_damping()->mutable_held_out()->add_ladder(0); }},
          {"spec.damping.held_out.ladder",
           [](auto& s) {
             for (int i = 0; i < 33; ++i) s.mutable_damping()->mutable_held_out()->add_ladder(1);
           }},
          {"spec.grid.zero_points",
           [](auto& s) {
             s.mutable_grid()->add_scales(1);
             s.mutable_grid()->add_zero_points(8);
           }},
          {"spec.grid.lowest_code",
           [](auto& s) {
             s.mutable_grid()->add_scales(1);
             s.mutable_grid()->set_lowest_code(9);
           }},
          {"spec.grid.highest_code",
           [](auto& s) {
             s.mutable_grid()->add_scales(1);
             s.mutable_grid()->set_highest_code(16);
           }},
          {"spec.grid.scales", [](auto& s) { s.mutable_grid()->add_scales(0); }},
          {"spec.certificate.failure_probability",
           [](auto& s) { s.mutable_certificate()->set_failure_probability(0); }},
          {"spec.min_tokens", [](auto& s) { s.set_min_tokens(0); }},
      },
      v1::QuantizationSpec());
}

TEST(ResolveSpecTest, RefusesWhatAScaleRuleCannotMean) {
  v1::QuantizationSpec start;
  start.set_method(v1::METHOD_NEAREST);
  start.set_scale(v1::SCALE_RULE_PISO);
  start.set_group_size(16);
  ExpectRefused(
      {
          {"spec.scale", [](auto& s) { s.set_scale(v1::SCALE_RULE_COMPENSATED); }},
          {"spec.scale_objective",
           [](auto& s) {
             s.set_scale(v1::SCALE_RULE_MSE);
             s.set_scale_objective(v1::SCALE_OBJECTIVE_MIXED);
           }},
          {"spec.scale_passes",
           [](auto& s) {
             s.clear_scale();
             s.set_scale_passes(1);
           }},
          {"spec.scale_passes", [](auto& s) { s.set_scale_passes(-1); }},
          {"spec.scale_passes", [](auto& s) { s.set_scale_passes(65); }},
          {"spec.scale_passes",
           [](auto& s) {
             s.set_group_size(0);
             s.set_scale_passes(1);
           }},
          {"spec.scale_passes",
           [](auto& s) {
             s.set_scale_objective(v1::SCALE_OBJECTIVE_DATA_FREE);
             s.set_scale_passes(1);
           }},
          {"spec.scale_passes",
           [](auto& s) {
             s.set_method(v1::METHOD_OPTQ);
             s.set_group_scales(v1::GROUP_SCALES_DYNAMIC);
             s.set_scale_passes(1);
           }},
      },
      start);
}

// What a format or an explicit grid cannot express, alone or for a layer of this size.
TEST(ResolveSpecTest, RefusesWhatDoesNotSuitTheLayer) {
  struct Refusal {
    const char* field;
    int64_t features;
    std::function<void(v1::QuantizationSpec&)> change;
  };
  const Refusal refusals[] = {
      {"spec.format", 64,
       [](auto& s) {
         s.set_format(v1::FORMAT_GPTQ);
         s.set_symmetric(false);
       }},
      {"spec.format", 60, [](auto& s) { s.set_format(v1::FORMAT_GPTQ); }},
      {"spec.scale_dtype", 64,
       [](auto& s) {
         s.set_format(v1::FORMAT_GPTQ_V2);
         s.set_scale_dtype(v1::DATA_TYPE_BF16);
       }},
      {"spec.group_scales", 64,
       [](auto& s) {
         s.set_format(v1::FORMAT_COMPRESSED_TENSORS);
         s.set_group_size(32);
         s.set_group_scales(v1::GROUP_SCALES_DYNAMIC);
         s.set_order(v1::ORDER_DECREASING_NORM);
       }},
      {"spec.group_scales", 64,
       [](auto& s) {
         s.set_format(v1::FORMAT_COMPRESSED_TENSORS);
         s.set_group_size(32);
         s.set_group_scales(v1::GROUP_SCALES_DYNAMIC);
         // Its order is decreasing_norm.
         s.set_quality(v1::QUALITY_FAST);
       }},
      {"spec.group_size", 64,
       [](auto& s) {
         s.set_format(v1::FORMAT_COMPRESSED_TENSORS);
         s.set_group_size(48);
       }},
      {"spec.grid.scales", 64, [](auto& s) { s.mutable_grid()->add_scales(1); }},
      {"spec.grid.zero_points", 64,
       [](auto& s) {
         s.set_symmetric(false);
         s.mutable_grid()->add_zero_points(8);
         for (int r = 0; r < 32; ++r) s.mutable_grid()->add_scales(1);
       }},
  };
  for (const Refusal& refusal : refusals) {
    v1::QuantizationSpec spec;
    refusal.change(spec);
    const auto resolved = ResolveSpec(spec);
    const absl::Status status =
        resolved.ok() ? CheckSpecForLayer(*resolved, 32, refusal.features) : resolved.status();
    EXPECT_EQ(status.code(), absl::StatusCode::kInvalidArgument);
    EXPECT_EQ(base::FieldOf(status), refusal.field) << status;
  }
}

// compressed-tensors takes every width, with zero points too, and whatever order has contiguous
// groups.
TEST(ResolveSpecTest, CompressedTensorsTakesEveryWidth) {
  for (int bits = 2; bits <= 8; ++bits) {
    for (const bool symmetric : {true, false}) {
      v1::QuantizationSpec spec;
      spec.set_format(v1::FORMAT_COMPRESSED_TENSORS);
      spec.set_bits(bits);
      spec.set_symmetric(symmetric);
      spec.set_group_size(32);
      spec.set_order(v1::ORDER_DECREASING_NORM);
      auto resolved = ResolveSpec(spec);
      ASSERT_TRUE(resolved.ok()) << resolved.status();
      EXPECT_TRUE(CheckSpecForLayer(*resolved, 21, 96).ok());
      spec.set_order(v1::ORDER_NATURAL);
      spec.set_group_scales(v1::GROUP_SCALES_DYNAMIC);
      EXPECT_TRUE(ResolveSpec(spec).ok());
      spec.set_order(v1::ORDER_DECREASING_NORM);
      spec.set_group_size(0);
      EXPECT_TRUE(ResolveSpec(spec).ok());
    }
  }
}

// A preset fills what is unset and nothing else, and what it fills can be sent again.
TEST(PresetTest, FillsWhatIsUnset) {
  for (const v1::Quality quality : {v1::QUALITY_FAST, v1::QUALITY_BALANCED, v1::QUALITY_BEST}) {
    v1::QuantizationSpec spec;
    spec.set_quality(quality);
    const auto filled = ResolveSpec(spec);
    ASSERT_TRUE(filled.ok()) << filled.status();
    EXPECT_EQ(ToProto(*filled).quality(), quality);
    EXPECT_EQ(filled->order, engine::Order::kDecreasingNorm);
    EXPECT_EQ(filled->scale, engine::ScaleRule::kCompensated);
    EXPECT_EQ(filled->NeedsHeldOut(), quality != v1::QUALITY_FAST);
    EXPECT_EQ(filled->damping_climb, quality != v1::QUALITY_FAST);
    EXPECT_EQ(filled->damping_candidates.size(), quality != v1::QUALITY_FAST ? 5U : 6U);
    EXPECT_EQ(filled->damping_value, quality == v1::QUALITY_FAST ? 0.1 : 0.01);
    EXPECT_EQ(filled->scale_trials, quality == v1::QUALITY_BEST ? 5 : 1);
    EXPECT_EQ(filled->polish, quality == v1::QUALITY_BEST ? 2 : 0);
    EXPECT_TRUE(filled->signed_scales);

    spec.set_order(v1::ORDER_NATURAL);
    spec.set_scale(v1::SCALE_RULE_ABSMAX);
    spec.mutable_damping()->set_absolute(7);
    spec.set_scale_trials(2);
    spec.set_polish(1);
    const auto kept = ResolveSpec(spec);
    ASSERT_TRUE(kept.ok()) << kept.status();
    EXPECT_EQ(kept->order, engine::Order::kNatural);
    EXPECT_EQ(kept->scale, engine::ScaleRule::kAbsmax);
    EXPECT_FALSE(kept->signed_scales);
    EXPECT_EQ(kept->damping_rule, DampingRule::kAbsolute);
    EXPECT_EQ(kept->damping_value, 7);
    EXPECT_EQ(kept->scale_trials, 2);
    EXPECT_EQ(kept->polish, 1);
  }
}

// Whatever a method, a grid or a rounding has no use for is not filled in.
TEST(PresetTest, FitsEveryMethodGridAndRounding) {
  for (const v1::Quality quality : {v1::QUALITY_FAST, v1::QUALITY_BALANCED, v1::QUALITY_BEST}) {
    for (const v1::Method method : {v1::METHOD_NEAREST, v1::METHOD_OPTQ, v1::METHOD_QRONOS}) {
      for (const v1::Rounding rounding : {v1::ROUNDING_NEAREST, v1::ROUNDING_STOCHASTIC}) {
        for (const bool given : {false, true}) {
          v1::QuantizationSpec spec;
          spec.set_quality(quality);
          spec.set_method(method);
          spec.set_rounding(rounding);
          if (given) spec.mutable_grid()->add_scales(1);
          EXPECT_TRUE(ResolveSpec(spec).ok()) << ResolveSpec(spec).status();
        }
      }
    }
  }
}

}  // namespace
}  // namespace certiq::server
