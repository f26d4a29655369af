// Certificates of the engine hold: every method, grid, order, format and damping.

#include "verify_layers.h"

#include <gtest/gtest.h>

#include <string>

#include "absl/strings/str_cat.h"
#include "verify.h"

namespace certiq::verify {
namespace {

using engine::ResolvedSpec;
using testing::LayerOptions;
using testing::QuantizeRandom;

void ExpectHolds(const LayerOptions& options, const ResolvedSpec& spec) {
  const auto layer = QuantizeRandom(options, spec);
  ASSERT_TRUE(layer.ok()) << layer.status();
  const auto report = Verify(layer->Sources(), layer->certificate);
  ASSERT_TRUE(report.ok()) << report.status();
  for (const Finding& finding : report->findings()) {
    EXPECT_FALSE(finding.verdict == Verdict::kWrong) << finding.name << "  " << finding.text;
  }
  EXPECT_GT(report->count(Verdict::kHolds), 30);
}

TEST(VerifyLayersTest, EveryMethodGridAndOrder) {
  uint64_t seed = 1;
  for (const auto method :
       {engine::Method::kNearest, engine::Method::kOptq, engine::Method::kQronos}) {
    for (const auto rounding : {engine::Rounding::kNearest, engine::Rounding::kStochastic}) {
      for (const int group : {0, 8, 16}) {
        for (const bool symmetric : {true, false}) {
          for (const auto order : {engine::Order::kNatural, engine::Order::kDecreasingNorm}) {
            for (const auto scales :
                 {engine::GroupScales::kStatic, engine::GroupScales::kDynamic}) {
              for (const bool mismatched : {false, true}) {
                ResolvedSpec spec;
                spec.method = method;
                spec.rounding = rounding;
                spec.seed = seed;
                spec.group_size = group;
                spec.symmetric = symmetric;
                spec.order = order;
                spec.group_scales = scales;
                spec.bits = static_cast<int32_t>(2 + seed % 7);
                spec.damping_rule = engine::DampingRule::kRelativeTrace;
                spec.compare_nearest = seed % 2 == 0;
                // A search that may turn grids over, every now and then.
                spec.signed_scales = symmetric && seed % 3 == 0;
                if (spec.signed_scales) spec.scale = engine::ScaleRule::kMse;
                LayerOptions options;
                options.mismatched = mismatched;
                options.seed = ++seed;
                SCOPED_TRACE(absl::StrCat(
                    "seed ", seed, " method ", static_cast<int>(method), " rounding ",
                    static_cast<int>(rounding), " group ", group, " symmetric ", symmetric,
                    " order ", static_cast<int>(order), " dynamic ", static_cast<int>(scales),
                    " mismatched ", mismatched, " bits ", spec.bits));
                ExpectHolds(options, spec);
              }
            }
          }
        }
      }
    }
  }
}

TEST(VerifyLayersTest, EveryFormat) {
  for (const auto format :
       {engine::Format::kDenseF16, engine::Format::kDenseBF16, engine::Format::kGptq,
        engine::Format::kGptqV2, engine::Format::kCompressedTensors}) {
    for (const int bits : {2, 3, 4, 8}) {
      for (const bool symmetric : {true, false}) {
        for (const bool dynamic : {false, true}) {
          if (format == engine::Format::kGptq && !symmetric) continue;
          ResolvedSpec spec;
          spec.format = format;
          spec.bits = bits;
          spec.symmetric = symmetric;
          spec.group_size = dynamic ? 16 : 0;
          spec.order = engine::Order::kDecreasingNorm;
          spec.group_scales =
              dynamic ? engine::GroupScales::kDynamic : engine::GroupScales::kStatic;
          spec.compare_nearest = true;
          LayerOptions options;
          options.rows = 32;
          options.features = 64;
          options.weight_dtype = v1::DATA_TYPE_BF16;
          options.x_dtype = dynamic ? v1::DATA_TYPE_F16 : v1::DATA_TYPE_F64;
          options.seed = static_cast<uint64_t>(bits);
          SCOPED_TRACE(absl::StrCat("format ", static_cast<int>(format), " bits ", bits,
                                    " symmetric ", symmetric, " dynamic ", dynamic));
          ExpectHolds(options, spec);
        }
      }
    }
  }
}

TEST(VerifyLayersTest, HeldOutRowsAndTheLadder) {
  for (const auto method :
       {engine::Method::kNearest, engine::Method::kOptq, engine::Method::kQronos}) {
    for (const bool ladder : {false, true}) {
      for (const bool mismatched : {false, true}) {
        for (const int64_t sequence_rows : {0, 7}) {
          ResolvedSpec spec;
          spec.method = method;
          spec.damping_rule =
              ladder ? engine::DampingRule::kHeldOut : engine::DampingRule::kRelativeTrace;
          LayerOptions options;
          options.tokens = 301;
          options.mismatched = mismatched;
          options.held_out_fraction = 0.125;
          options.sequence_rows = sequence_rows;
          SCOPED_TRACE(absl::StrCat("method ", static_cast<int>(method), " ladder ", ladder,
                                    " mismatched ", mismatched, " rows ", sequence_rows));
          ExpectHolds(options, spec);
        }
      }
    }
  }
}

// A calibration that one stream filled: its name tells which rows were held out.
TEST(VerifyLayersTest, HeldOutRowsOfAStream) {
  LayerOptions options;
  options.tokens = 301;
  options.held_out_fraction = 0.125;
  options.sequence_rows = 7;
  options.stream_id = "rank-0";
  const auto layer = QuantizeRandom(options, {});
  ASSERT_TRUE(layer.ok()) << layer.status();
  v1::Certificate certificate = layer->certificate;
  certificate.clear_x_sha256();
  certificate.set_calibration_id("c1");
  certificate.set_sums_sha256("5a5a");
  Sources sources = layer->Sources();
  EXPECT_TRUE(absl::IsUnimplemented(Verify(sources, certificate).status()));
  sources.stream_id = "rank-0";
  const auto report = Verify(sources, certificate);
  ASSERT_TRUE(report.ok()) << report.status();
  EXPECT_EQ(report->count(Verdict::kWrong), 0) << FindingsText(*report);
  EXPECT_GT(report->count(Verdict::kHolds), 30);
  // Another stream's rows were others.
  sources.stream_id = "rank-1";
  const auto other = Verify(sources, certificate);
  ASSERT_TRUE(other.ok()) << other.status();
  EXPECT_GT(other->count(Verdict::kWrong), 0);
  // A call's own activations belong to no stream.
  EXPECT_TRUE(absl::IsInvalidArgument(Verify(sources, layer->certificate).status()));
}

TEST(VerifyLayersTest, DampingRules) {
  for (const auto rule : {engine::DampingRule::kAbsolute, engine::DampingRule::kRelativeSigmaMax}) {
    for (const double value : {1e-6, 1e-2, 10.0}) {
      for (const bool mismatched : {false, true}) {
        ResolvedSpec spec;
        spec.method = engine::Method::kQronos;
        spec.damping_rule = rule;
        spec.damping_value = value;
        LayerOptions options;
        options.mismatched = mismatched;
        SCOPED_TRACE(absl::StrCat("rule ", static_cast<int>(rule), " value ", value));
        ExpectHolds(options, spec);
      }
    }
  }
}

// Fewer tokens than features and next to no damping: some attempts fail, then all of them do.
TEST(VerifyLayersTest, FailedAttemptsAndTheFallBack) {
  for (const int attempts : {1, 8}) {
    for (const bool mismatched : {false, true}) {
      ResolvedSpec spec;
      spec.damping_rule = engine::DampingRule::kAbsolute;
      spec.damping_value = 0;
      spec.max_attempts = attempts;
      spec.on_failure = engine::OnFailure::kNearest;
      LayerOptions options;
      options.tokens = 20;
      options.mismatched = mismatched;
      SCOPED_TRACE(absl::StrCat("attempts ", attempts, " mismatched ", mismatched));
      ExpectHolds(options, spec);
    }
  }
}

TEST(VerifyLayersTest, DeadFeaturesAndClipping) {
  for (const auto method :
       {engine::Method::kNearest, engine::Method::kOptq, engine::Method::kQronos}) {
    for (const auto rounding : {engine::Rounding::kNearest, engine::Rounding::kStochastic}) {
      for (const bool mismatched : {false, true}) {
        for (const auto order : {engine::Order::kNatural, engine::Order::kDecreasingNorm}) {
          ResolvedSpec spec;
          spec.method = method;
          spec.rounding = rounding;
          spec.order = order;
          spec.bits = 2;
          spec.scale = engine::ScaleRule::kMse;
          spec.damping_rule = engine::DampingRule::kRelativeTrace;
          spec.damping_value = 1e-3;
          LayerOptions options;
          options.mismatched = mismatched;
          options.dead = {0, 7, 39};
          SCOPED_TRACE(absl::StrCat("method ", static_cast<int>(method), " rounding ",
                                    static_cast<int>(rounding), " mismatched ", mismatched,
                                    " order ", static_cast<int>(order)));
          ExpectHolds(options, spec);
        }
      }
    }
  }
}

// Rows and groups of a row that are too small for float16 or bfloat16, or that float32 holds as
// subnormal numbers only.
TEST(VerifyLayersTest, WeightsTooSmallForTheirScales) {
  using engine::DType;
  using engine::Format;
  struct Types {
    Format format;
    DType scales;
    // Of the normal weights' size, below the least scale.
    double factor;
  };
  const Types all[] = {
      {Format::kDenseF32, DType::kF16, 1e-8},
      {Format::kDenseF32, DType::kBF16, 1e-43},
      {Format::kDenseF16, DType::kF32, 1e-8},
      {Format::kDenseBF16, DType::kF32, 1e-41},
      {Format::kGptqV2, DType::kF16, 1e-8},
      {Format::kCompressedTensors, DType::kF16, 1e-8},
      {Format::kCompressedTensors, DType::kBF16, 1e-43},
  };
  uint64_t seed = 1;
  for (const Types& types : all) {
    for (const auto method :
         {engine::Method::kNearest, engine::Method::kOptq, engine::Method::kQronos}) {
      for (const auto rule : {engine::ScaleRule::kAbsmax, engine::ScaleRule::kMse,
                              engine::ScaleRule::kPiso, engine::ScaleRule::kCompensated}) {
        const bool nearest = method == engine::Method::kNearest;
        if (rule == engine::ScaleRule::kCompensated && nearest) continue;
        for (const auto rounding : {engine::Rounding::kNearest, engine::Rounding::kStochastic}) {
          ResolvedSpec spec;
          spec.format = types.format;
          spec.scale_dtype = types.scales;
          spec.method = method;
          spec.scale = rule;
          spec.rounding = rounding;
          ++seed;
          // The search of every scale takes long with eight bits.
          spec.bits = seed % 2 == 0 || rule == engine::ScaleRule::kPiso ? 4 : 8;
          spec.symmetric = seed % 3 != 0;
          spec.group_size = seed % 4 < 2 ? 0 : 16;
          // A small group among others takes part in their order of work only where it is static.
          spec.group_scales =
              seed % 5 == 0 ? engine::GroupScales::kDynamic : engine::GroupScales::kStatic;
          spec.order = seed % 7 < 4 ? engine::Order::kDecreasingNorm : engine::Order::kNatural;
          spec.scale_trials = nearest || seed % 3 == 1 ? 1 : 3;
          spec.polish = rounding == engine::Rounding::kNearest && seed % 2 == 0 ? 2 : 0;
          LayerOptions options;
          options.rows = 32;
          options.features = 64;
          options.seed = seed;
          options.mismatched = seed % 2 == 1;
          options.small = {{3, types.factor}, {17, types.factor}, {20, types.factor, 16, 32}};
          SCOPED_TRACE(absl::StrCat("seed ", seed, " format ", static_cast<int>(types.format),
                                    " scales ", static_cast<int>(types.scales), " method ",
                                    static_cast<int>(method), " rule ", static_cast<int>(rule),
                                    " rounding ", static_cast<int>(rounding)));
          ExpectHolds(options, spec);
          const auto layer = QuantizeRandom(options, spec);
          ASSERT_TRUE(layer.ok());
          EXPECT_GE(layer->certificate.underflow().rows(), 2);
          EXPECT_EQ(layer->certificate.underflow().first_rows(0), 3);
          EXPECT_EQ(layer->certificate.underflow().first_rows(1), 17);
        }
      }
    }
  }
}

TEST(VerifyLayersTest, SmallestLayers) {
  for (const int64_t features : {1, 2}) {
    for (const auto method :
         {engine::Method::kNearest, engine::Method::kOptq, engine::Method::kQronos}) {
      for (const bool mismatched : {false, true}) {
        ResolvedSpec spec;
        spec.method = method;
        spec.damping_rule = engine::DampingRule::kRelativeTrace;
        spec.per_row = features == 1;
        LayerOptions options;
        options.rows = 3;
        options.features = features;
        options.tokens = 5;
        options.mismatched = mismatched;
        SCOPED_TRACE(absl::StrCat("features ", features, " method ", static_cast<int>(method),
                                  " mismatched ", mismatched));
        ExpectHolds(options, spec);
      }
    }
  }
}

}  // namespace
}  // namespace certiq::verify
