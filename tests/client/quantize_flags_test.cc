#include "quantize_flags.h"

#include <string>
#include <utility>
#include <vector>

#include "CLI/CLI.hpp"
#include "absl/strings/str_cat.h"
#include "certiq/v1/quantization_service.pb.h"
#include "google/protobuf/text_format.h"
#include "google/protobuf/util/message_differencer.h"
#include "gtest/gtest.h"
#include "test_util.h"

namespace certiq::cli {
namespace {

using testing::Contains;

const std::vector<std::string>& Required() {
  static const auto* const kFlags = new std::vector<std::string>{
      "--server", "localhost:1",   "--weights",     "w.safetensors", "--weight",
      "l.weight", "--activations", "a.safetensors", "--x",           "l.x"};
  return *kFlags;
}

// Parses `quantize` with the required flags and these. Throws CLI::ParseError.
QuantizeFlags Parse(const std::vector<std::string>& more,
                    const std::vector<std::string>& required = Required()) {
  CLI::App app;
  QuantizeFlags flags;
  AddQuantizeVerb(&app, &flags);
  std::vector<std::string> all = {"quantize"};
  all.insert(all.end(), required.begin(), required.end());
  all.insert(all.end(), more.begin(), more.end());
  app.parse(std::vector<std::string>(all.rbegin(), all.rend()));
  return flags;
}

std::string UsageError(const std::vector<std::string>& more,
                       const std::vector<std::string>& required = Required()) {
  try {
    Parse(more, required);
  } catch (const CLI::ParseError& error) {
    EXPECT_NE(error.get_exit_code(), 0);
    return error.what();
  }
  ADD_FAILURE() << "was accepted: " << ::testing::PrintToString(more);
  return "";
}

struct SpecCase {
  std::string flag;
  std::string value;
  // The spec as text, without compare_nearest, which is always true.
  std::string spec;
};

class SpecFlagTest : public ::testing::TestWithParam<SpecCase> {};

TEST_P(SpecFlagTest, SetsItsFieldAndNoOther) {
  v1::QuantizationSpec expected;
  ASSERT_TRUE(google::protobuf::TextFormat::ParseFromString(GetParam().spec, &expected));
  if (!expected.certificate().has_compare_nearest()) {
    expected.mutable_certificate()->set_compare_nearest(true);
  }
  const std::string& flag = GetParam().flag;
  const std::string& value = GetParam().value;
  for (const auto& arguments : {std::vector<std::string>{flag, value},
                                std::vector<std::string>{absl::StrCat(flag, "=", value)}}) {
    const v1::QuantizationSpec spec = Parse(arguments).spec;
    EXPECT_TRUE(google::protobuf::util::MessageDifferencer::Equals(spec, expected))
        << flag << "=" << value << " gave " << spec.ShortDebugString();
  }
}

INSTANTIATE_TEST_SUITE_P(
    Choices, SpecFlagTest,
    ::testing::Values(
        SpecCase{"--method", "optq", "method: METHOD_OPTQ"},
        SpecCase{"--method", "qronos", "method: METHOD_QRONOS"},
        SpecCase{"--method", "nearest", "method: METHOD_NEAREST"},
        SpecCase{"--method", "rtn", "method: METHOD_NEAREST"},
        SpecCase{"--method", "gptq", "method: METHOD_OPTQ"},
        SpecCase{"--symmetric", "true", "symmetric: true"},
        SpecCase{"--symmetric", "false", "symmetric: false"},
        SpecCase{"--group_scales", "static", "group_scales: GROUP_SCALES_STATIC"},
        SpecCase{"--group_scales", "dynamic", "group_scales: GROUP_SCALES_DYNAMIC"},
        SpecCase{"--scale", "absmax", "scale: SCALE_RULE_ABSMAX"},
        SpecCase{"--scale", "mse", "scale: SCALE_RULE_MSE"},
        SpecCase{"--scale", "piso", "scale: SCALE_RULE_PISO"},
        SpecCase{"--scale", "compensated", "scale: SCALE_RULE_COMPENSATED"},
        SpecCase{"--scale_objective", "inputs", "scale_objective: SCALE_OBJECTIVE_INPUTS"},
        SpecCase{"--scale_objective", "quantized_inputs",
                 "scale_objective: SCALE_OBJECTIVE_QUANTIZED_INPUTS"},
        SpecCase{"--scale_objective", "mixed", "scale_objective: SCALE_OBJECTIVE_MIXED"},
        SpecCase{"--scale_objective", "data_free", "scale_objective: SCALE_OBJECTIVE_DATA_FREE"},
        SpecCase{"--scale_passes", "2", "scale_passes: 2"},
        SpecCase{"--rounding", "nearest", "rounding: ROUNDING_NEAREST"},
        SpecCase{"--rounding", "stochastic", "rounding: ROUNDING_STOCHASTIC"},
        SpecCase{"--order", "natural", "order: ORDER_NATURAL"},
        SpecCase{"--order", "decreasing_norm", "order: ORDER_DECREASING_NORM"},
        SpecCase{"--desc_act", "true", "order: ORDER_DECREASING_NORM"},
        SpecCase{"--desc_act", "false", "order: ORDER_NATURAL"},
        SpecCase{"--act_order", "true", "order: ORDER_DECREASING_NORM"},
        SpecCase{"--act_order", "false", "order: ORDER_NATURAL"},
        SpecCase{"--on_failure", "fail", "damping { on_failure: ON_FAILURE_FAIL }"},
        SpecCase{"--on_failure", "nearest", "damping { on_failure: ON_FAILURE_NEAREST }"},
        SpecCase{"--quality", "fast", "quality: QUALITY_FAST"},
        SpecCase{"--quality", "balanced", "quality: QUALITY_BALANCED"},
        SpecCase{"--quality", "best", "quality: QUALITY_BEST"},
        SpecCase{"--scale_dtype", "f16", "scale_dtype: DATA_TYPE_F16"},
        SpecCase{"--scale_dtype", "bf16", "scale_dtype: DATA_TYPE_BF16"},
        SpecCase{"--scale_dtype", "f32", "scale_dtype: DATA_TYPE_F32"},
        SpecCase{"--format", "dense_f32", "format: FORMAT_DENSE_F32"},
        SpecCase{"--format", "dense_f16", "format: FORMAT_DENSE_F16"},
        SpecCase{"--format", "dense_bf16", "format: FORMAT_DENSE_BF16"},
        SpecCase{"--format", "gptq", "format: FORMAT_GPTQ"},
        SpecCase{"--format", "gptq_v2", "format: FORMAT_GPTQ_V2"},
        SpecCase{"--format", "compressed_tensors", "format: FORMAT_COMPRESSED_TENSORS"},
        SpecCase{"--compare_nearest", "true", "certificate { compare_nearest: true }"},
        SpecCase{"--compare_nearest", "false", "certificate { compare_nearest: false }"},
        SpecCase{"--per_row", "false", "certificate { per_row: false }"},
        SpecCase{"--per_row", "true", "certificate { per_row: true }"}));

INSTANTIATE_TEST_SUITE_P(
    Numbers, SpecFlagTest,
    ::testing::Values(
        SpecCase{"--bits", "3", "bits: 3"},
        // What makes sense is the server's to say.
        SpecCase{"--bits", "1", "bits: 1"}, SpecCase{"--bits", "9", "bits: 9"},
        SpecCase{"--bits", "-3", "bits: -3"}, SpecCase{"--bits", "0", "bits: 0"},
        SpecCase{"--group_size", "64", "group_size: 64"},
        SpecCase{"--group_size", "-1", "group_size: -1"},
        SpecCase{"--group_size", "3", "group_size: 3"},
        SpecCase{"--group_size", "0", "group_size: 0"},
        SpecCase{"--scale_trials", "9", "scale_trials: 9"},
        SpecCase{"--signed_scales", "true", "signed_scales: true"},
        SpecCase{"--scale_trials", "-9", "scale_trials: -9"},
        SpecCase{"--polish", "2", "polish: 2"},
        SpecCase{"--seed", "18446744073709551615", "seed: 18446744073709551615"},
        SpecCase{"--seed", "0", "seed: 0"},
        SpecCase{"--damping", "relative_trace:0.01", "damping { relative_trace: 0.01 }"},
        SpecCase{"--damping", "relative_trace:-1", "damping { relative_trace: -1 }"},
        SpecCase{"--damp_percent", "0.01", "damping { relative_trace: 0.01 }"},
        SpecCase{"--damp_percent", "-1", "damping { relative_trace: -1 }"},
        SpecCase{"--damping", "absolute:1", "damping { absolute: 1 }"},
        SpecCase{"--damping", "absolute:0", "damping { absolute: 0 }"},
        SpecCase{"--damping", "relative_sigma_max:1e-6", "damping { relative_sigma_max: 1e-6 }"},
        SpecCase{"--damping", "held_out", "damping { held_out { } }"},
        SpecCase{"--damping", "held_out:0.01,3", "damping { held_out { ladder: [0.01, 3] } }"},
        SpecCase{"--damping", "held_out_climb", "damping { held_out { climb: true } }"},
        SpecCase{"--damping", "held_out_climb:0.01,3",
                 "damping { held_out { ladder: [0.01, 3] climb: true } }"},
        SpecCase{"--damping", "held_out:1", "damping { held_out { ladder: 1 } }"},
        SpecCase{"--max_attempts", "7", "damping { max_attempts: 7 }"},
        SpecCase{"--damping_factor", "2.5", "damping { factor: 2.5 }"},
        SpecCase{"--failure_probability", "1e-6", "certificate { failure_probability: 1e-6 }"},
        SpecCase{"--min_tokens", "9000000000", "min_tokens: 9000000000"}));

TEST(QuantizeFlagsTest, NothingGivenNothingSet) {
  const QuantizeFlags flags = Parse({});
  EXPECT_EQ(flags.spec.ShortDebugString(), "certificate { compare_nearest: true }");
  EXPECT_FALSE(flags.held_out_fraction.has_value());
  EXPECT_EQ(flags.connection.server, "localhost:1");
  EXPECT_EQ(flags.weights_file, "w.safetensors");
  EXPECT_EQ(flags.weight, "l.weight");
  EXPECT_EQ(flags.activations_file, "a.safetensors");
  EXPECT_EQ(flags.x, "l.x");
  EXPECT_EQ(flags.x_quantized, "");
  EXPECT_EQ(flags.output_file, "");
  EXPECT_EQ(flags.report_file, "");
}

TEST(QuantizeFlagsTest, OtherFlags) {
  const QuantizeFlags flags = Parse(
      {"--x_quantized=l.xq", "--held_out_fraction", "0.125", "--sequence_rows=64", "--output=o",
       "--report", "r", "--tls_ca=a", "--tls_cert=b", "--tls_key=c", "--token_file=d"});
  EXPECT_EQ(flags.x_quantized, "l.xq");
  EXPECT_EQ(flags.held_out_fraction, 0.125);
  EXPECT_EQ(flags.sequence_rows, 64);
  EXPECT_EQ(flags.output_file, "o");
  EXPECT_EQ(flags.report_file, "r");
  EXPECT_EQ(flags.connection.tls_ca, "a");
  EXPECT_EQ(flags.connection.tls_cert, "b");
  EXPECT_EQ(flags.connection.tls_key, "c");
  EXPECT_EQ(flags.connection.token_file, "d");
}

TEST(QuantizeFlagsTest, DampingAndOnFailureTogetherInAnyOrder) {
  for (const auto& arguments :
       {std::vector<std::string>{"--damping=absolute:2", "--on_failure=nearest"},
        std::vector<std::string>{"--on_failure=nearest", "--damping=absolute:2"}}) {
    const v1::Damping damping = Parse(arguments).spec.damping();
    EXPECT_EQ(damping.absolute(), 2);
    EXPECT_EQ(damping.on_failure(), v1::ON_FAILURE_NEAREST);
  }
}

TEST(QuantizeFlagsTest, UsageErrorsNameTheFlagAndWhatIsExpected) {
  EXPECT_TRUE(Contains(UsageError({"--bits", "four"}), "--bits: expected a 32-bit integer"));
  for (const char* bad : {"--bits=4.5",
                          "--bits=",
                          "--bits=99999999999",
                          "--seed=-1",
                          "--seed=x",
                          "--group_size=64x",
                          "--polish=1e3",
                          "--held_out_fraction=half",
                          "--held_out_fraction=nan",
                          "--held_out_fraction=inf",
                          "--symmetric=yes",
                          "--symmetric=1",
                          "--method=GPTQ",
                          "--method=OPTQ",
                          "--method=unspecified",
                          "--scale_dtype=f64",
                          "--format=dense",
                          "--damping=0.01",
                          "--damping=auto",
                          "--damping=absolute",
                          "--damping=absolute:",
                          "--damping=absolute:x",
                          "--damping=absolute:inf",
                          "--damping=held_out:",
                          "--damping=held_out:1,,2",
                          "--damp_percent=auto",
                          "--damp_percent=inf",
                          "--damp_percent=relative_trace:0.01",
                          "--desc_act=yes",
                          "--act_order=decreasing_norm",
                          "--max_attempts=2.5",
                          "--damping_factor=ten",
                          "--failure_probability=p",
                          "--min_tokens=many",
                          "--sequence_rows=x",
                          "--damping=trace:1",
                          "--quality=good",
                          "--order=random",
                          "--rounding=up",
                          "--scale=max",
                          "--group_scales=both",
                          "--on_failure=retry",
                          "--per_row=maybe",
                          "--compare_nearest=2",
                          "--scale_trials=x"}) {
    const std::string flag = std::string(bad).substr(0, std::string(bad).find('='));
    EXPECT_TRUE(Contains(UsageError({bad}), flag));
  }
  EXPECT_TRUE(Contains(UsageError({"--bogus=1"}), "--bogus"));
  EXPECT_TRUE(Contains(UsageError({"stray"}), "stray"));
  EXPECT_TRUE(Contains(UsageError({"--bits", "3", "--bits", "4"}), "--bits"));
  EXPECT_TRUE(Contains(UsageError({"--bits"}), "--bits"));
  EXPECT_TRUE(Contains(UsageError({"--output=o", "--report=o"}), "two different files"));
}

TEST(QuantizeFlagsTest, TwoFlagsForOneFieldAreAnErrorThatNamesBoth) {
  const std::vector<std::pair<std::string, std::string>> conflicts = {
      {"--order=natural", "--desc_act=false"},
      {"--order=decreasing_norm", "--act_order=true"},
      {"--desc_act=true", "--act_order=true"},
      {"--damping=relative_trace:0.01", "--damp_percent=0.01"},
      {"--damping=held_out", "--damp_percent=0.01"}};
  for (const auto& [one, other] : conflicts) {
    const std::string expected = absl::StrCat(one.substr(0, one.find('=')), " and ",
                                              other.substr(0, other.find('=')), ": expected one");
    EXPECT_TRUE(Contains(UsageError({one, other}), expected));
    EXPECT_TRUE(Contains(UsageError({other, one}), expected));
  }
}

TEST(QuantizeFlagsTest, AliasesGoWithTheFlagsOfOtherFields) {
  const v1::QuantizationSpec spec =
      Parse({"--damp_percent=0.05", "--max_attempts=3", "--desc_act=true", "--method=gptq"}).spec;
  EXPECT_EQ(spec.damping().relative_trace(), 0.05);
  EXPECT_EQ(spec.damping().max_attempts(), 3);
  EXPECT_EQ(spec.order(), v1::ORDER_DECREASING_NORM);
  EXPECT_EQ(spec.method(), v1::METHOD_OPTQ);
}

TEST(QuantizeFlagsTest, HelpNamesTheAliases) {
  CLI::App app;
  QuantizeFlags flags;
  const std::string help = AddQuantizeVerb(&app, &flags)->help();
  for (const char* const alias : {"--desc_act", "--act_order", "--damp_percent", "rtn", "gptq"}) {
    EXPECT_TRUE(Contains(help, alias));
  }
}

TEST(QuantizeFlagsTest, RequiredFlags) {
  for (size_t i = 0; i < Required().size(); i += 2) {
    std::vector<std::string> flags = Required();
    flags.erase(flags.begin() + static_cast<int64_t>(i),
                flags.begin() + static_cast<int64_t>(i) + 2);
    EXPECT_TRUE(Contains(UsageError({}, flags), Required()[i]));
  }
  std::vector<std::string> flags = Required();
  flags.resize(6);
  EXPECT_TRUE(Contains(UsageError({}, flags), "--calibration"));
  EXPECT_TRUE(Contains(UsageError({"--x_quantized=q", "--calibration=c"}, flags), "--x_quantized"));
  EXPECT_EQ(Parse({"--calibration=c"}, flags).calibration, "c");
  EXPECT_TRUE(Contains(UsageError({"--calibration=c"}), "--activations and --calibration"));
  for (const char* flag : {"--held_out_fraction=0.1", "--sequence_rows=5"}) {
    EXPECT_TRUE(Contains(UsageError({"--calibration=c", flag}, flags), "--activations and --x"));
  }
  flags[1] = "localhost";
  EXPECT_TRUE(Contains(UsageError({"--calibration=c"}, flags), "HOST:PORT"));
}

TEST(FlagForFieldTest, FindsTheFlagOfWhatTheServerNames) {
  EXPECT_EQ(FlagForField("spec.bits"), "--bits");
  EXPECT_EQ(FlagForField("header.spec.bits"), "--bits");
  EXPECT_EQ(FlagForField("spec.scale"), "--scale");
  EXPECT_EQ(FlagForField("spec.scale_trials"), "--scale_trials");
  EXPECT_EQ(FlagForField("spec.signed_scales"), "--signed_scales");
  EXPECT_EQ(FlagForField("spec.damping.relative_trace"), "--damping");
  EXPECT_EQ(FlagForField("spec.damping.on_failure"), "--on_failure");
  EXPECT_EQ(FlagForField("weight.shape"), "--weight");
  EXPECT_EQ(FlagForField("x_quantized.shape[1]"), "--x_quantized");
  EXPECT_EQ(FlagForField("x"), "--x");
  EXPECT_EQ(FlagForField("spec.grid"), "");
  EXPECT_EQ(FlagForField(""), "");
}

}  // namespace
}  // namespace certiq::cli
