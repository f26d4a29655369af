// A report in which one number was changed is caught, whatever the number.

#include <gtest/gtest.h>

#include <functional>
#include <set>
#include <string>
#include <vector>

#include "absl/strings/str_cat.h"
#include "google/protobuf/descriptor.h"
#include "verify.h"
#include "verify_layers.h"

namespace certiq::verify {
namespace {

using google::protobuf::FieldDescriptor;
using google::protobuf::Message;
using testing::LayerOptions;
using testing::QuantizeRandom;
using testing::VerifiedLayer;

// Fields that leave no trace in weights, tokens and codes, with the reason.
const std::set<std::string>& Uncheckable() {
  static const auto* const kFields = new std::set<std::string>{
      // Says who and when, or is for people.
      "engine_version", "isa", "warnings", "damping_attempts.detail", "phase_seconds.receive",
      "phase_seconds.queue", "phase_seconds.factor", "phase_seconds.round", "phase_seconds.certify",
      "phase_seconds.reference", "phase_seconds.pack",
      // What the service's own rounding left.
      "identity_residual",
      // Higham's estimate may be anywhere between a tenth of the truth and the truth.
      "condition_estimate",
      // Each step of the ladder but the chosen one is a run whose result is gone.
      "ladder.held_out_relative_error",
      // Another split by the same rule may be the same split.
      "held_out_fraction", "held_out_block_rows",
      // How scales were found; the scales are checked as they are. The type only sets a precision.
      "spec.scale", "spec.scale_dtype", "spec.group_scales", "spec.scale_trials", "spec.polish",
      // That negative scales would have been allowed.
      "spec.signed_scales", "spec.quality",
      // The result before polishing is not stored.
      "polish.damped_squared_error_before",
      // What would have been done.
      "spec.damping.max_attempts", "spec.damping.factor", "spec.damping.on_failure",
      // A ladder's ratio that was a candidate and not the best.
      "spec.damping.held_out.ladder", "spec.damping.held_out.climb",
      // Where nothing is stochastic.
      "spec.certificate.failure_probability"};
  return *kFields;
}

// One field at a time, of a copy.
void ForEachChange(
    const Message& message, const std::string& prefix,
    const std::function<void(const std::string&, const std::function<void(Message*)>&)>& visit) {
  const auto* const reflection = message.GetReflection();
  std::vector<const FieldDescriptor*> fields;
  reflection->ListFields(message, &fields);
  // Zeros are not listed, and may be changed too.
  for (int i = 0; i < message.GetDescriptor()->field_count(); ++i) {
    const FieldDescriptor* const field = message.GetDescriptor()->field(i);
    if (!field->has_presence() && !field->is_repeated() && !reflection->HasField(message, field)) {
      fields.push_back(field);
    }
  }
  for (const FieldDescriptor* const field : fields) {
    const std::string name = absl::StrCat(prefix, field->name());
    if (field->cpp_type() == FieldDescriptor::CPPTYPE_MESSAGE) {
      const Message& child = field->is_repeated()
                                 ? reflection->GetRepeatedMessage(message, field, 0)
                                 : reflection->GetMessage(message, field);
      ForEachChange(child, name + ".", [&](const std::string& path, const auto& change) {
        visit(path, [&](Message* copy) {
          change(field->is_repeated() ? reflection->MutableRepeatedMessage(copy, field, 0)
                                      : reflection->MutableMessage(copy, field));
        });
      });
      continue;
    }
    visit(name, [&, field](Message* copy) {
      const auto* const r = copy->GetReflection();
      const bool repeated = field->is_repeated();
      switch (field->cpp_type()) {
        case FieldDescriptor::CPPTYPE_DOUBLE: {
          const double old =
              repeated ? r->GetRepeatedDouble(*copy, field, 0) : r->GetDouble(*copy, field);
          // One percent; what NEAREST's bound may be off outward is a tenth of that.
          double value = old == 0 ? 0.01 : 1.01 * old;
          // Where only ties clip, by 1e-6 of a step.
          if (field->name() == "worst_overshoot") value += 1e-3;
          repeated ? r->SetRepeatedDouble(copy, field, 0, value) : r->SetDouble(copy, field, value);
          break;
        }
        case FieldDescriptor::CPPTYPE_INT32:
          r->SetInt32(copy, field, r->GetInt32(*copy, field) + 1);
          break;
        case FieldDescriptor::CPPTYPE_INT64: {
          if (repeated) {
            r->SetRepeatedInt64(copy, field, 0, r->GetRepeatedInt64(*copy, field, 0) + 1);
            break;
          }
          // The largest weight of a group is half a step outside: up to 72 groups count or not.
          const bool slack = field->name() == "clipped_weights" || field->name() == "clipped_rows";
          r->SetInt64(copy, field, r->GetInt64(*copy, field) + (slack ? 80 : 1));
          break;
        }
        case FieldDescriptor::CPPTYPE_UINT64:
          r->SetUInt64(copy, field, r->GetUInt64(*copy, field) + 1);
          break;
        case FieldDescriptor::CPPTYPE_BOOL:
          r->SetBool(copy, field, !r->GetBool(*copy, field));
          break;
        case FieldDescriptor::CPPTYPE_ENUM: {
          const int old = r->GetEnumValue(*copy, field);
          r->SetEnumValue(copy, field, old == 1 ? 2 : 1);
          break;
        }
        case FieldDescriptor::CPPTYPE_STRING:
          repeated ? r->SetRepeatedString(copy, field, 0, "0") : r->SetString(copy, field, "0");
          break;
        default:
          FAIL() << name;
      }
    });
  }
}

bool Holds(const VerifiedLayer& layer, const v1::Certificate& certificate) {
  const auto report = Verify(layer.Sources(), certificate);
  return report.ok() && report->count(Verdict::kWrong) == 0;
}

void ExpectEveryChangeCaught(const LayerOptions& options, const engine::ResolvedSpec& spec,
                             const std::set<std::string>& without_trace = {}) {
  const auto layer = QuantizeRandom(options, spec);
  ASSERT_TRUE(layer.ok()) << layer.status();
  const auto report = Verify(layer->Sources(), layer->certificate);
  ASSERT_TRUE(report.ok()) << report.status();
  ASSERT_EQ(report->count(Verdict::kWrong), 0) << FindingsText(*report);
  int64_t changed = 0;
  ForEachChange(layer->certificate, "", [&](const std::string& name, const auto& change) {
    if (Uncheckable().contains(name) || without_trace.contains(name)) return;
    v1::Certificate copy = layer->certificate;
    change(&copy);
    ++changed;
    EXPECT_FALSE(Holds(*layer, copy)) << name << " may be changed unnoticed";
  });
  EXPECT_GT(changed, 40);
}

TEST(VerifyMutationTest, Optq) {
  engine::ResolvedSpec spec;
  spec.group_size = 16;
  spec.order = engine::Order::kDecreasingNorm;
  spec.compare_nearest = true;
  LayerOptions options;
  options.held_out_fraction = 0.125;
  options.dead = {5};
  ExpectEveryChangeCaught(options, spec);
}

TEST(VerifyMutationTest, QronosWithALadder) {
  engine::ResolvedSpec spec;
  spec.method = engine::Method::kQronos;
  spec.group_size = 16;
  spec.order = engine::Order::kDecreasingNorm;
  spec.damping_rule = engine::DampingRule::kHeldOut;
  LayerOptions options;
  options.mismatched = true;
  options.held_out_fraction = 0.125;
  ExpectEveryChangeCaught(options, spec);
}

TEST(VerifyMutationTest, TrialsAndPolishWithALadder) {
  engine::ResolvedSpec spec;
  spec.group_size = 16;
  spec.order = engine::Order::kDecreasingNorm;
  spec.scale_trials = 3;
  spec.polish = 1;
  spec.damping_rule = engine::DampingRule::kHeldOut;
  spec.damping_candidates = {0.01, 0.03, 0.1, 0.3, 1};
  spec.damping_climb = true;
  LayerOptions options;
  options.mismatched = true;
  options.held_out_fraction = 0.125;
  options.dead = {5};
  ExpectEveryChangeCaught(options, spec);
}

TEST(VerifyMutationTest, PolishedNearest) {
  engine::ResolvedSpec spec;
  spec.method = engine::Method::kNearest;
  spec.group_size = 16;
  spec.symmetric = false;
  spec.polish = 1;
  ExpectEveryChangeCaught({}, spec, {"spec.order", "spec.damping.relative_trace"});
}

// A polished result that got worse, or polish that is not told.
TEST(VerifyMutationTest, PolishThatDidNotHelp) {
  engine::ResolvedSpec spec;
  spec.polish = 2;
  const auto layer = QuantizeRandom({}, spec);
  ASSERT_TRUE(layer.ok()) << layer.status();
  ASSERT_TRUE(Holds(*layer, layer->certificate));
  v1::Certificate copy = layer->certificate;
  copy.mutable_polish()->set_damped_squared_error_before(0.99 * copy.damped_squared_error());
  EXPECT_FALSE(Holds(*layer, copy));
  copy = layer->certificate;
  copy.clear_polish();
  EXPECT_FALSE(Holds(*layer, copy));
  copy = layer->certificate;
  copy.mutable_spec()->set_polish(0);
  EXPECT_FALSE(Holds(*layer, copy));
}

TEST(VerifyMutationTest, Stochastic) {
  engine::ResolvedSpec spec;
  spec.rounding = engine::Rounding::kStochastic;
  spec.seed = 9;
  spec.scale_trials = 4;
  spec.group_size = 16;
  spec.order = engine::Order::kDecreasingNorm;
  LayerOptions options;
  options.mismatched = true;
  ExpectEveryChangeCaught(options, spec);
}

TEST(VerifyMutationTest, Nearest) {
  engine::ResolvedSpec spec;
  spec.method = engine::Method::kNearest;
  spec.group_size = 16;
  LayerOptions options;
  options.mismatched = true;
  // Without feedback there is no order, and no damping.
  ExpectEveryChangeCaught(options, spec, {"spec.order", "spec.damping.relative_trace"});
}

TEST(VerifyMutationTest, Underflow) {
  engine::ResolvedSpec spec;
  spec.scale_dtype = engine::DType::kF16;
  spec.group_size = 16;
  LayerOptions options;
  options.small = {{2, 1e-8}, {9, 1e-8, 16, 32}};
  ExpectEveryChangeCaught(options, spec);
  // Named nowhere, or a row that has other weights.
  const auto layer = QuantizeRandom(options, spec);
  ASSERT_TRUE(layer.ok()) << layer.status();
  v1::Certificate copy = layer->certificate;
  copy.clear_underflow();
  EXPECT_FALSE(Holds(*layer, copy));
  copy = layer->certificate;
  copy.mutable_underflow()->add_first_rows(11);
  EXPECT_FALSE(Holds(*layer, copy));
}

// Half a thousandth more than a bound that follows from e and D: nobody needs to grant it.
TEST(VerifyMutationTest, LooserBounds) {
  for (const int bits : {3, 8}) {
    for (const auto rounding : {engine::Rounding::kNearest, engine::Rounding::kStochastic}) {
      engine::ResolvedSpec spec;
      spec.bits = bits;
      spec.rounding = rounding;
      spec.seed = 9;
      const auto layer = QuantizeRandom({}, spec);
      ASSERT_TRUE(layer.ok()) << layer.status();
      ASSERT_TRUE(Holds(*layer, layer->certificate));
      v1::Certificate copy = layer->certificate;
      copy.set_row_bound(3, copy.row_bound(3) * 1.0005);
      EXPECT_FALSE(Holds(*layer, copy)) << bits;
      copy = layer->certificate;
      copy.set_l2_bound(copy.l2_bound() * 1.0005);
      EXPECT_FALSE(Holds(*layer, copy)) << bits;
      copy = layer->certificate;
      copy.set_linf_bound(copy.linf_bound() * 1.0005);
      EXPECT_FALSE(Holds(*layer, copy)) << bits;
    }
  }
}

// Tokens that were summed beforehand: the sums alone have a digest, which nobody can check here.
TEST(VerifyMutationTest, Calibration) {
  engine::ResolvedSpec spec;
  spec.group_size = 16;
  const auto layer = QuantizeRandom({}, spec);
  ASSERT_TRUE(layer.ok()) << layer.status();
  VerifiedLayer summed = *layer;
  summed.certificate.clear_x_sha256();
  summed.certificate.set_calibration_id("c1");
  summed.certificate.set_sums_sha256("5a5a");
  const auto report = Verify(summed.Sources(), summed.certificate);
  ASSERT_TRUE(report.ok()) << report.status();
  EXPECT_EQ(report->count(Verdict::kWrong), 0);
  bool said = false;
  for (const Finding& finding : report->findings()) {
    said = said || (finding.verdict == Verdict::kNotChecked &&
                    finding.name == "calibration_id, sums_sha256");
  }
  EXPECT_TRUE(said);
  // Digests of activations that the call did not bring.
  v1::Certificate copy = summed.certificate;
  copy.set_x_sha256(layer->certificate.x_sha256());
  EXPECT_FALSE(Holds(summed, copy));
  copy = summed.certificate;
  copy.set_x_quantized_sha256("5a5a");
  EXPECT_FALSE(Holds(summed, copy));
  // Other activations than those summed.
  summed.x.data[2] = static_cast<char>(summed.x.data[2] ^ 0x40);
  EXPECT_FALSE(Holds(summed, summed.certificate));
  // Which tokens a stream held out is not to be seen.
  copy = summed.certificate;
  copy.set_held_out_fraction(0.25);
  copy.set_held_out_block_rows(256);
  EXPECT_TRUE(absl::IsUnimplemented(Verify(summed.Sources(), copy).status()));
}

// A code, a scale or a weight that is not what was certified.
TEST(VerifyMutationTest, ChangedTensors) {
  engine::ResolvedSpec spec;
  spec.format = engine::Format::kGptqV2;
  spec.symmetric = true;
  LayerOptions options;
  options.rows = 32;
  options.features = 64;
  const auto layer = QuantizeRandom(options, spec);
  ASSERT_TRUE(layer.ok()) << layer.status();
  ASSERT_TRUE(Holds(*layer, layer->certificate));
  for (size_t t = 0; t < layer->result.size(); ++t) {
    VerifiedLayer other = *layer;
    other.result[t].data[0] = static_cast<char>(other.result[t].data[0] ^ 4);
    EXPECT_FALSE(Holds(other, other.certificate)) << other.result[t].name;
    other = *layer;
    other.result[t].shape.back() += 1;
    EXPECT_FALSE(Holds(other, other.certificate)) << other.result[t].name;
    other = *layer;
    other.result.erase(other.result.begin() + static_cast<int64_t>(t));
    EXPECT_FALSE(Holds(other, other.certificate)) << layer->result[t].name;
  }
  VerifiedLayer other = *layer;
  other.weight.data[2] = static_cast<char>(other.weight.data[2] ^ 0x40);
  EXPECT_FALSE(Holds(other, other.certificate));
  other = *layer;
  other.x.data[2] = static_cast<char>(other.x.data[2] ^ 0x40);
  EXPECT_FALSE(Holds(other, other.certificate));
}

}  // namespace
}  // namespace certiq::verify
