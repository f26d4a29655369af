#include "engine/scale_search.h"

#include <algorithm>
#include <bit>
#include <cmath>
#include <limits>
#include <utility>

#include "engine/simd.h"

namespace certiq::engine {
namespace {

// Partial sums side by side.
constexpr int64_t kParts = 2 * kLanes<float>;
static_assert(kParts <= DiagonalMetric::kPadding);
// Features whose terms are added in float32.
constexpr int64_t kChunk = 1024;
static_assert(kChunk % kParts == 0);
// Normalised scales below this one count as zero.
constexpr double kVanishing = 0x1p-100;

// How far a float32 evaluation of F may be off. With u = 2^-24: sums of 1024 / 32 terms and their
// tree, (32 + 6 + 3) u F < 2^-18 F. The residual is off by 2 u |w_j|, a code is wrong only within
// 2^-23 of a tie, where it costs no more than 2^-21 |e_j| |w_j|; by Cauchy-Schwarz both together
// stay below 2^-20 sqrt(F c), c = sum_j M_jj w_j^2. (With 8 or 16 lanes chains are 128 long:
// 2^-16.)
constexpr double kSumTolerance = kParts >= 32 ? 0x1p-18 : 0x1p-16;
double Tolerance(double error, double all) {
  return kSumTolerance * error + 0x1p-20 * std::sqrt(error * all);
}

float SumParts(float* parts) {
  for (int64_t half = kParts / 2; half > 0; half /= 2) {
    for (int64_t k = 0; k < half; ++k) parts[k] += parts[k + half];
  }
  return parts[0];
}

// The spacing of the type's values at x > 0.
double Spacing(DType dtype, double x) {
  const int digits = dtype == DType::kF32 ? 23 : (dtype == DType::kF16 ? 10 : 7);
  const double least = dtype == DType::kF16 ? 0x1p-14 : 0x1p-126;
  // The power of two at or below x.
  constexpr uint64_t kExponent = 0x7ff0000000000000u;
  const auto power = std::bit_cast<double>(std::bit_cast<uint64_t>(x) & kExponent);
  const auto digit = std::bit_cast<double>(static_cast<uint64_t>(1023 - digits) << 52);
  return std::max(power, least) * digit;
}

double Largest(DType dtype) {
  if (dtype == DType::kF16) return 65504;
  return dtype == DType::kF32 ? std::numeric_limits<float>::max()
                              : std::ldexp(2 - std::ldexp(1.0, -7), 127);
}

}  // namespace

double RepresentableBelow(DType dtype, double x) {
  if (x <= 0) return 0;
  if (x >= Largest(dtype)) return Largest(dtype);
  const double spacing = Spacing(dtype, x);
  return std::floor(x / spacing) * spacing;
}

double RepresentableAbove(DType dtype, double x) {
  if (x <= 0) return 0;
  if (x > Largest(dtype)) return std::numeric_limits<double>::infinity();
  const double spacing = Spacing(dtype, x);
  return std::ceil(x / spacing) * spacing;
}

DiagonalMetric::DiagonalMetric(std::vector<double> values) : exact_(std::move(values)) {
  double largest = 0;
  for (const double value : exact_) largest = std::max(largest, value);
  scaled_.resize(exact_.size() + kPadding);
  if (largest == 0) return;
  for (size_t j = 0; j < exact_.size(); ++j) scaled_[j] = static_cast<float>(exact_[j] / largest);
  unit_ = largest;
}

ScaleSearch::ScaleSearch(const ResolvedSpec& spec) : spec_(spec), top_((1 << spec.bits) - 1) {}

void ScaleSearch::Load(const float* weights, int64_t count) {
  count_ = count;
  const auto padded = static_cast<size_t>((count + kParts - 1) / kParts * kParts);
  weights_.assign(padded, 0.0f);
  const auto inverse = static_cast<float>(1 / unit_);
  for (int64_t j = 0; j < count; ++j) {
    weights_[static_cast<size_t>(j)] = weights[j] * inverse;
  }
}

ScaleSearch::Value ScaleSearch::Evaluate(double scale, int32_t first_zero, int32_t last_zero) {
  ++evaluations_;
  const double normal = scale / unit_;
  const bool vanishes = normal < kVanishing;
  const float s = vanishes ? 0.0f : static_cast<float>(normal);
  const float inverse = vanishes ? 0x1p120f : static_cast<float>(1 / normal);
  const auto lowest = static_cast<float>(-last_zero);
  const auto highest = static_cast<float>(top_ - first_zero);
  const auto padded = static_cast<int64_t>(weights_.size());
  Value value;
  for (int64_t begin = 0; begin < padded; begin += kChunk) {
    const int64_t end = std::min(begin + kChunk, padded);
    alignas(kVectorBytes) float error[kParts] = {};
    alignas(kVectorBytes) float energy[kParts] = {};
    for (int64_t j = begin; j < end; j += kParts) {
      const float* w = weights_.data() + j;
      const float* m = metric_ + j;
      for (int64_t k = 0; k < kParts; ++k) {
        const float nearest = std::nearbyint(w[k] * inverse);
        const float above = nearest > lowest ? nearest : lowest;
        const float code = above < highest ? above : highest;
        const float e = w[k] - s * code;
        error[k] += m[k] * e * e;
        energy[k] += m[k] * code * code;
      }
    }
    value.error += static_cast<double>(SumParts(error));
    value.energy += static_cast<double>(SumParts(energy));
  }
  return value;
}

bool ScaleSearch::NarrowZeros(double low, int32_t& first_zero, int32_t& last_zero) const {
  if (low == 0 || first_zero == last_zero) return true;
  // Codes needed on either side at the lower end, where they are largest; a tie is no matter.
  const double all = top_;
  const auto below = static_cast<int32_t>(std::min(all, std::nearbyint(-low_ / low)));
  const auto above = static_cast<int32_t>(std::min(all, std::nearbyint(high_ / low)));
  // Where nothing has to clip, one zero point is as good as another.
  const int32_t least = std::min(top_ - above, below);
  first_zero = std::max(first_zero, least);
  last_zero = std::min(last_zero, below);
  return first_zero <= last_zero;
}

void ScaleSearch::Push(double low, double high, int32_t first_zero, int32_t last_zero,
                       const Value* at_low, const Value* at_high) {
  Node node;
  node.low = low;
  node.high = high;
  node.first_zero = first_zero;
  node.last_zero = last_zero;
  if (!NarrowZeros(low, node.first_zero, node.last_zero)) return;
  const bool narrowed = node.first_zero != first_zero || node.last_zero != last_zero;
  const auto value = [&](const Value* known, double scale) {
    if (known != nullptr && !narrowed) return *known;
    return Evaluate(scale, node.first_zero, node.last_zero);
  };
  node.at_low = value(at_low, low);
  node.at_high = value(at_high, high);
  if (node.first_zero == node.last_zero) {
    for (const double error : {node.at_low.error, node.at_high.error}) {
      least_ = std::min(least_, error + Tolerance(error, all_));
    }
  }
  // The least of the parabola through both ends with the largest curvature there is.
  const double width = (high - low) / unit_;
  const double bend = node.at_low.energy * width * width;
  const double rise = node.at_high.error - node.at_low.error;
  const double larger = std::max(node.at_low.error, node.at_high.error);
  node.bound = std::min(node.at_low.error, node.at_high.error);
  if (std::abs(rise) < bend) {
    node.bound =
        0.5 * (node.at_low.error + node.at_high.error) - 0.25 * bend - 0.25 * rise * (rise / bend);
  }
  node.bound -= Tolerance(larger, all_) + kSumTolerance * bend;
  if (node.bound > least_) return;
  heap_.push_back(node);
  std::push_heap(heap_.begin(), heap_.end(), Later);
}

void ScaleSearch::Split(const Node& node) {
  // Where an interval is wide, so is the range of zero points that fit it.
  if (node.first_zero < node.last_zero && node.high - node.low <= 0.25 * node.low) {
    const int32_t middle = (node.first_zero + node.last_zero) / 2;
    Push(node.low, node.high, node.first_zero, middle, nullptr, nullptr);
    Push(node.low, node.high, middle + 1, node.last_zero, nullptr, nullptr);
    return;
  }
  const double middle = RepresentableBelow(spec_.scale_dtype, 0.5 * (node.low + node.high));
  if (middle <= node.low) {
    // Its ends are all that the type holds.
    for (int32_t zero = node.first_zero; zero <= node.last_zero; ++zero) {
      Node single = node;
      single.first_zero = zero;
      single.last_zero = zero;
      Finish(single);
    }
    return;
  }
  const Value at_middle = Evaluate(middle, node.first_zero, node.last_zero);
  Push(node.low, middle, node.first_zero, node.last_zero, &node.at_low, &at_middle);
  Push(middle, node.high, node.first_zero, node.last_zero, &at_middle, &node.at_high);
}

bool ScaleSearch::IsSmall(const Node& node) const {
  if (node.first_zero != node.last_zero || node.low == 0) return false;
  // Breakpoints expected: each weight has |w| / s of them in a factor e of scales. Passing over the
  // weights costs as much as sorting some.
  const double codes = std::min<double>(top_, std::max(-low_, high_) / node.low);
  const double expected = 0.3 * static_cast<double>(count_) * codes * (node.high / node.low - 1);
  return expected <= 8 + static_cast<double>(count_) / 64;
}

void ScaleSearch::Offer(double scale, double error, int32_t zero) {
  if (scale <= 0 || !(error < best_error_)) return;
  best_error_ = error;
  best_.scale = static_cast<float>(scale);
  best_.zero = zero;
}

void ScaleSearch::Finish(const Node& node) {
  ++finished_;
  const double low = node.low > 0 ? node.low : node.high;
  const double lowest = -node.last_zero;
  const double highest = top_ - node.first_zero;
  const double inverse_low = 1 / low;
  const double inverse_high = 1 / node.high;
  constexpr int64_t kSums = 8;
  double linear[kSums] = {};
  double energy[kSums] = {};
  double whole[kSums] = {};
  codes_.resize(2 * static_cast<size_t>(count_ + kSums));
  float* at_low = codes_.data();
  float* at_high = codes_.data() + count_ + kSums;
  const auto clip = [lowest, highest](double x) {
    const double above = x > lowest ? x : lowest;
    return above < highest ? above : highest;
  };
  const auto add = [&](int64_t j, int64_t k) {
    const double w = row_[j];
    const double m = exact_[j];
    const double code = clip(std::nearbyint(w * inverse_low));
    at_low[j] = static_cast<float>(code);
    at_high[j] = static_cast<float>(clip(std::nearbyint(w * inverse_high)));
    linear[k] += m * w * code;
    energy[k] += m * code * code;
    whole[k] += m * w * w;
  };
  const int64_t blocks = count_ / kSums * kSums;
  for (int64_t begin = 0; begin < blocks; begin += kSums) {
    for (int64_t k = 0; k < kSums; ++k) add(begin + k, k);
  }
  for (int64_t j = blocks; j < count_; ++j) add(j, j - blocks);
  double a = 0;
  double b = 0;
  double c = 0;
  for (int64_t k = 0; k < kSums; ++k) {
    a += linear[k];
    b += energy[k];
    c += whole[k];
  }
  events_.clear();
  for (int64_t j = 0; j < count_; ++j) {
    if (at_low[j] == at_high[j]) continue;
    const double size = std::abs(static_cast<double>(row_[j]));
    for (auto code = static_cast<int32_t>(std::abs(at_low[j]));
         code > static_cast<int32_t>(std::abs(at_high[j])); --code) {
      events_.push_back({size / (code - 0.5), static_cast<int32_t>(j), code});
    }
  }
  std::sort(events_.begin(), events_.end());

  const auto minimise = [&](double from, double to) {
    if (b > 0 && c - a * (a / b) >= best_error_) return;
    const double aim = b > 0 ? std::clamp(a / b, from, to) : from;
    for (const double scale :
         {RepresentableBelow(spec_.scale_dtype, aim), RepresentableAbove(spec_.scale_dtype, aim)}) {
      // At an end of the interval F is the same from both sides.
      if (scale < from || scale > to) continue;
      Offer(scale, c - 2 * scale * a + scale * scale * b, node.first_zero);
    }
  };
  double from = low;
  for (const Event& event : events_) {
    const double to = std::clamp(event.scale, from, node.high);
    minimise(from, to);
    const double m = exact_[event.feature];
    a -= m * std::abs(static_cast<double>(row_[event.feature]));
    b -= m * (2.0 * event.code - 1);
    from = to;
  }
  minimise(from, node.high);
  least_ = std::min(least_, best_error_ / (unit_ * unit_ * metric_unit_));
}

Step ScaleSearch::Find(const float* weights, int64_t count, const DiagonalMetric& metric,
                       int64_t first) {
  float lows[kParts] = {};
  float highs[kParts] = {};
  const auto see = [&](int64_t j, int64_t k) {
    lows[k] = weights[j] < lows[k] ? weights[j] : lows[k];
    highs[k] = weights[j] > highs[k] ? weights[j] : highs[k];
  };
  const int64_t blocks = count / kParts * kParts;
  for (int64_t begin = 0; begin < blocks; begin += kParts) {
    for (int64_t k = 0; k < kParts; ++k) see(begin + k, k);
  }
  for (int64_t j = blocks; j < count; ++j) see(j, j - blocks);
  const float bottom = *std::min_element(lows, lows + kParts);
  const float top = *std::max_element(highs, highs + kParts);
  low_ = bottom;
  high_ = top;
  const Step whole = AbsmaxStep(spec_, bottom, top);
  if (low_ == high_ || !(whole.scale > 0) || !std::isfinite(whole.scale)) return whole;
  const double largest = std::max(-low_, high_);
  // So that neither weights nor their inverse leave float32.
  unit_ = std::ldexp(1.0, std::clamp(std::ilogb(largest) + 1, -125, 126));
  row_ = weights;
  exact_ = metric.exact(first);
  metric_ = metric.scaled(first);
  metric_unit_ = metric.unit();
  Load(weights, count);
  heap_.clear();
  best_ = whole;
  best_error_ = std::numeric_limits<double>::infinity();
  least_ = std::numeric_limits<double>::infinity();
  const int32_t first_zero = spec_.symmetric ? 1 << (spec_.bits - 1) : 0;
  const int32_t last_zero = spec_.symmetric ? first_zero : top_;
  const Value at_zero = Evaluate(0, first_zero, last_zero);
  all_ = at_zero.error;
  if (!(all_ > 0) || !std::isfinite(all_)) return whole;

  // From where every code is 0 down.
  double high = std::min(RepresentableAbove(spec_.scale_dtype, 2.001 * largest),
                         RepresentableBelow(spec_.scale_dtype, 3 * largest));
  Value at_high = Evaluate(high, first_zero, last_zero);
  while (8.0 * high > static_cast<double>(whole.scale)) {
    const double low = RepresentableBelow(spec_.scale_dtype, 0.5 * high);
    if (low <= 0) break;
    const Value at_low = Evaluate(low, first_zero, last_zero);
    Push(low, high, first_zero, last_zero, &at_low, &at_high);
    high = low;
    at_high = at_low;
  }
  Push(0, high, first_zero, last_zero, &at_zero, &at_high);
  while (!heap_.empty() && heap_.front().bound <= least_) {
    std::pop_heap(heap_.begin(), heap_.end(), Later);
    const Node node = heap_.back();
    heap_.pop_back();
    if (IsSmall(node)) {
      Finish(node);
    } else {
      Split(node);
    }
  }
  return best_;
}

}  // namespace certiq::engine
