// Settings of a quantization, every one decided.

#ifndef CERTIQ_ENGINE_SPEC_H_
#define CERTIQ_ENGINE_SPEC_H_

#include <cstdint>
#include <memory>
#include <optional>
#include <vector>

#include "engine/kernels/dtype.h"

namespace certiq::engine {

enum class Method { kNearest, kOptq, kQronos };
enum class GroupScales { kStatic, kDynamic };
enum class ScaleRule { kAbsmax, kMse, kPiso, kCompensated };
// Objectives of kPiso; see spec.proto.
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

// Every setting decided, with the contract's defaults for OPTQ; see spec.proto for meanings and
// units. Values are in the ranges given there: contract/resolve_spec.h checks them.
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
  // Unset: decided by whether tokens were held out (V3), for Qronos.
  std::optional<DampingRule> damping_rule = DampingRule::kRelativeTrace;
  double damping_value = 0.01;
  // Multiples of trace / N for kHeldOut.
  std::vector<double> damping_candidates = {0.001, 0.01, 0.03, 0.1, 0.3, 1};
  // Whether only as many of them are run as it takes to find the best; they rise then.
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
  // Whether tokens have to be held out for this spec to run (V2). Plain rounding damps nothing.
  bool NeedsHeldOut() const {
    return method != Method::kNearest && damping_rule == DampingRule::kHeldOut;
  }
};

}  // namespace certiq::engine

#endif  // CERTIQ_ENGINE_SPEC_H_
