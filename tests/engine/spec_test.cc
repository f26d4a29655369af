#include "engine/spec.h"

#include <gtest/gtest.h>

#include <cmath>
#include <functional>

#include "engine/status.h"

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
      {"spec.certificate.failure_probability", [](auto& s) { s.failure_probability = 0; }},
  };
  for (const BadSpec& b : bad) {
    QuantizationSpec spec;
    b.spoil(spec);
    const auto resolved = ResolveSpec(spec);
    EXPECT_EQ(resolved.status().code(), absl::StatusCode::kInvalidArgument) << b.field;
    EXPECT_EQ(FieldOf(resolved.status()), b.field);
  }
}

}  // namespace
}  // namespace certiq::engine
