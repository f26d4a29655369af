// What to do with a layer: the engine's view of QuantizationSpec.

#ifndef CERTIQ_ENGINE_SPEC_H_
#define CERTIQ_ENGINE_SPEC_H_

#include <cstdint>
#include <memory>
#include <optional>
#include <vector>

#include "absl/status/statusor.h"
#include "engine/kernels/dtype.h"

namespace certiq::engine {

enum class Method { kNearest, kOptq, kQronos };
enum class GroupScales { kStatic, kDynamic };
enum class ScaleRule { kAbsmax, kMse, kPiso, kCompensated };
// What PISO's scales are judged by; see spec.proto.
enum class ScaleObjective { kInputs, kQuantizedInputs, kMixed, kDataFree };
enum class Rounding { kNearest, kStochastic };
enum class Order { kNatural, kDecreasingNorm };
enum class OnFailure { kFail, kNearest };
enum class Format { kDenseF32, kDenseF16, kDenseBF16, kGptq, kGptqV2, kCompressedTensors };
enum class Quality { kFast, kBalanced, kBest };
enum class DampingRule { kRelativeTrace, kAbsolute, kRelativeSigmaMax, kHeldOut };

// A grid given by the caller. Row-major [rows, groups].
struct ExplicitGrid {
  std::vector<float> scales;
  // Empty for a symmetric grid.
  std::vector<int32_t> zero_points;
  std::optional<int32_t> lowest_code;
  std::optional<int32_t> highest_code;
};

// As it came: what is not set is filled by ResolveSpec.
struct QuantizationSpec {
  std::optional<Method> method;
  std::optional<int32_t> bits;
  std::optional<bool> symmetric;
  std::optional<int32_t> group_size;
  std::optional<DType> scale_dtype;
  std::optional<ExplicitGrid> grid;
  std::optional<GroupScales> group_scales;
  std::optional<ScaleRule> scale;
  std::optional<ScaleObjective> scale_objective;
  std::optional<int32_t> scale_passes;
  std::optional<bool> signed_scales;
  std::optional<int32_t> scale_trials;
  std::optional<int32_t> polish;
  std::optional<Rounding> rounding;
  std::optional<uint64_t> seed;
  std::optional<Order> order;
  std::optional<DampingRule> damping_rule;
  // For the rules with a number.
  std::optional<double> damping_value;
  // For kHeldOut; empty: the default ladder.
  std::vector<double> damping_ladder;
  std::optional<bool> damping_climb;
  std::optional<int32_t> max_attempts;
  std::optional<double> damping_factor;
  std::optional<OnFailure> on_failure;
  std::optional<Format> format;
  std::optional<Quality> quality;
  std::optional<bool> per_row;
  std::optional<double> failure_probability;
  std::optional<bool> compare_nearest;
  std::optional<int64_t> min_tokens;
};

// Every setting decided; see spec.proto for meanings and units.
struct ResolvedSpec {
  Method method = Method::kOptq;
  int32_t bits = 4;
  bool symmetric = true;
  int64_t group_size = 0;
  DType scale_dtype = DType::kF32;
  // Null: searched for.
  std::shared_ptr<const ExplicitGrid> grid;
  GroupScales group_scales = GroupScales::kStatic;
  ScaleRule scale = ScaleRule::kAbsmax;
  // For kPiso. Unset where another rule is.
  std::optional<ScaleObjective> scale_objective;
  int32_t scale_passes = 0;
  bool signed_scales = false;
  // Sweeps, the first with the scales found; 1: no others.
  int32_t scale_trials = 1;
  // Passes of coordinate descent at most.
  int32_t polish = 0;
  Rounding rounding = Rounding::kNearest;
  uint64_t seed = 0;
  Order order = Order::kNatural;
  // Unset: Qronos decides by whether tokens were held out (V3).
  std::optional<DampingRule> damping_rule;
  double damping_value = 0.01;
  // Multiples of trace / N for kHeldOut.
  std::vector<double> damping_ladder;
  // Only as many of them as it takes to find the best.
  bool damping_climb = false;
  int32_t max_attempts = 5;
  double damping_factor = 10;
  OnFailure on_failure = OnFailure::kFail;
  Format format = Format::kDenseF32;
  // The preset that filled what was not set.
  std::optional<Quality> quality;
  bool per_row = true;
  double failure_probability = 1e-3;
  bool compare_nearest = false;
  // Fewer tokens to fit are refused.
  int64_t min_tokens = 1;

  // Scales a row has for this many features.
  int64_t Groups(int64_t features) const {
    return group_size == 0 ? 1 : (features + group_size - 1) / group_size;
  }
  int64_t GroupOf(int64_t feature) const { return group_size == 0 ? 0 : feature / group_size; }
  // The type that dequantized levels are rounded to.
  DType LevelType() const {
    if (format == Format::kDenseF16) return DType::kF16;
    return format == Format::kDenseBF16 ? DType::kBF16 : DType::kF32;
  }
  // Whether tokens have to be held out for this spec to run (V2).
  bool NeedsHeldOut() const { return damping_rule == DampingRule::kHeldOut; }
};

// Fills defaults and checks every value. INVALID_ARGUMENT or UNIMPLEMENTED
// naming the field ("spec.bits").
absl::StatusOr<ResolvedSpec> ResolveSpec(const QuantizationSpec& spec);

// Checks what depends on the layer's size: an explicit grid's counts, what a
// format demands. INVALID_ARGUMENT naming the field.
absl::Status CheckSpecForLayer(const ResolvedSpec& spec, int64_t rows, int64_t features);

}  // namespace certiq::engine

#endif  // CERTIQ_ENGINE_SPEC_H_
