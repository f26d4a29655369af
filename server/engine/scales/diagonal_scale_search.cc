#include "engine/scales/diagonal_scale_search.h"

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <utility>

#include "engine/kernels/simd.h"

namespace certiq::engine {
namespace {

// Partial sums side by side.
constexpr int64_t kParts = int64_t{2} * kLanes<float>;
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

double SumParts(const float* parts) {
  return static_cast<double>(
      SumLanes<float>(LoadVector(parts) + LoadVector(parts + kLanes<float>)));
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

DiagonalScaleSearch::DiagonalScaleSearch(const ResolvedSpec& spec)
    : spec_(spec), top_((1 << spec.bits) - 1) {}

void DiagonalScaleSearch::Load(const float* weights, int64_t count) {
  count_ = count;
  const auto padded = static_cast<size_t>((count + kParts - 1) / kParts * kParts);
  weights_.assign(padded, 0.0f);
  const auto inverse = static_cast<float>(1 / unit_);
  for (int64_t j = 0; j < count; ++j) {
    weights_[static_cast<size_t>(j)] = weights[j] * inverse;
  }
}

template <int kRanges>
void DiagonalScaleSearch::Sum(double scale, const float* lowest, const float* highest,
                              Value* values) const {
  const double normal = scale / unit_;
  const bool vanishes = normal < kVanishing;
  const float s = vanishes ? 0.0f : static_cast<float>(normal);
  const float inverse = vanishes ? 0x1p120f : static_cast<float>(1 / normal);
  const auto padded = static_cast<int64_t>(weights_.size());
  for (int64_t begin = 0; begin < padded; begin += kChunk) {
    const int64_t end = std::min(begin + kChunk, padded);
    alignas(kVectorBytes) float error[kRanges][kParts] = {};
    alignas(kVectorBytes) float energy[kRanges][kParts] = {};
    for (int64_t j = begin; j < end; j += kParts) {
      const float* w = weights_.data() + j;
      const float* m = metric_ + j;
      for (int64_t k = 0; k < kParts; ++k) {
        const float nearest = std::nearbyint(w[k] * inverse);
#pragma GCC unroll 2
        for (int i = 0; i < kRanges; ++i) {
          const float above = nearest > lowest[i] ? nearest : lowest[i];
          const float code = above < highest[i] ? above : highest[i];
          const float e = w[k] - s * code;
          error[i][k] += m[k] * e * e;
          energy[i][k] += m[k] * code * code;
        }
      }
    }
    for (int i = 0; i < kRanges; ++i) {
      values[i].error += SumParts(error[i]);
      values[i].energy += SumParts(energy[i]);
    }
  }
}

DiagonalScaleSearch::Values DiagonalScaleSearch::Evaluate(double scale, const Zeros& zeros) {
  ++evaluations_;
  Values values{zeros.first, zeros.last, {}, {}};
  if (zeros.count() == 2) {
    const float lowest[2] = {static_cast<float>(-zeros.first), static_cast<float>(-zeros.last)};
    const float highest[2] = {static_cast<float>(top_ - zeros.first),
                              static_cast<float>(top_ - zeros.last)};
    Value both[2];
    Sum<2>(scale, lowest, highest, both);
    values.of_first = both[0];
    values.of_last = both[1];
    return values;
  }
  const auto lowest = static_cast<float>(-zeros.last);
  const auto highest = static_cast<float>(top_ - zeros.first);
  Sum<1>(scale, &lowest, &highest, &values.of_first);
  values.of_last = values.of_first;
  return values;
}

DiagonalScaleSearch::Values DiagonalScaleSearch::Select(const Values* known, double scale,
                                                        const Zeros& zeros) {
  if (known != nullptr && known->last - known->first <= 1) {
    // One of two that are known each.
    if (zeros.count() == 1 && zeros.first == known->first) {
      return {zeros.first, zeros.last, known->of_first, known->of_first};
    }
    if (zeros.count() == 1 && zeros.last == known->last) {
      return {zeros.first, zeros.last, known->of_last, known->of_last};
    }
  }
  if (known != nullptr && zeros.first == known->first && zeros.last == known->last) return *known;
  return Evaluate(scale, zeros);
}

double DiagonalScaleSearch::Bound(const Value& at_low, const Value& at_high, double width) const {
  // The least of the parabola through both ends with the largest curvature there is.
  const double bend = at_low.energy * width * width;
  const double rise = at_high.error - at_low.error;
  const double larger = std::max(at_low.error, at_high.error);
  double bound = std::min(at_low.error, at_high.error);
  if (std::abs(rise) < bend) {
    bound = 0.5 * (at_low.error + at_high.error) - 0.25 * bend - 0.25 * rise * (rise / bend);
  }
  return bound - (Tolerance(larger, all_) + kSumTolerance * bend);
}

bool DiagonalScaleSearch::NarrowZeros(double low, Zeros& zeros) const {
  if (low == 0 || zeros.least == zeros.most) return true;
  // Codes needed on either side at the lower end, where they are largest; a tie is no matter.
  const double all = top_;
  const auto below = static_cast<int32_t>(std::min(all, std::nearbyint(-low_ / low)));
  const auto above = static_cast<int32_t>(std::min(all, std::nearbyint(high_ / low)));
  // Where nothing has to clip, one zero point is as good as another: of those at hand the one next
  // to what the lower end needs.
  zeros.least = std::clamp(std::min(top_ - above, below), zeros.least, zeros.most);
  zeros.most = std::clamp(below, zeros.least, zeros.most);
  zeros.first = std::max(zeros.first, zeros.least);
  zeros.last = std::min(zeros.last, zeros.most);
  return zeros.first <= zeros.last;
}

void DiagonalScaleSearch::Push(double low, double high, const Zeros& given,
                               const Values* known_at_low, const Values* known_at_high) {
  Zeros zeros = given;
  if (!NarrowZeros(low, zeros)) return;
  const Values at_low = Select(known_at_low, low, zeros);
  const Values at_high = Select(known_at_high, high, zeros);
  const bool pair = zeros.count() == 2;
  if (pair || zeros.count() == 1) {
    const double error = std::min({at_low.of_first.error, at_low.of_last.error,
                                   at_high.of_first.error, at_high.of_last.error});
    least_ = std::min(least_, error + Tolerance(error, all_));
  }
  const double width = (high - low) / unit_;
  double bound_first = Bound(at_low.of_first, at_high.of_first, width);
  double bound_last = pair ? Bound(at_low.of_last, at_high.of_last, width) : bound_first;
  const double bound = std::min(bound_first, bound_last);
  if (bound > least_) return;
  // The one that is left of two zero points.
  if (bound_first > least_) {
    zeros.first = zeros.last;
    bound_first = bound_last;
  } else if (bound_last > least_) {
    zeros.last = zeros.first;
    bound_last = bound_first;
  }
  heap_.push_back({bound, nodes_.size()});
  std::push_heap(heap_.begin(), heap_.end(), Entry::Later);
  nodes_.push_back({bound_first, bound_last, low, high, zeros, at_low, at_high});
}

void DiagonalScaleSearch::Split(const Node& node) {
  // Where an interval is wide, so is the range of zero points that fit it.
  const Zeros& zeros = node.zeros;
  if (zeros.count() > 2 && node.high - node.low <= 0.25 * node.low) {
    const int32_t middle = (zeros.first + zeros.last) / 2;
    Push(node.low, node.high, {zeros.first, middle, zeros.least, zeros.most}, nullptr, nullptr);
    Push(node.low, node.high, {middle + 1, zeros.last, zeros.least, zeros.most}, nullptr, nullptr);
    return;
  }
  const double middle = RepresentableBelow(spec_.scale_dtype, 0.5 * (node.low + node.high));
  if (middle <= node.low) {
    // Its ends are all that the type holds.
    for (int32_t zero = zeros.first; zero <= zeros.last; ++zero) Finish(node.low, node.high, zero);
    return;
  }
  const Values at_middle = Evaluate(middle, zeros);
  Push(node.low, middle, zeros, &node.at_low, &at_middle);
  Push(middle, node.high, zeros, &at_middle, &node.at_high);
}

bool DiagonalScaleSearch::IsSmall(const Node& node) const {
  if (node.zeros.count() > 2 || node.low == 0) return false;
  // Breakpoints expected: each weight has |w| / s of them in a factor e of scales. Passing over the
  // weights costs as much as sorting some.
  const double codes = std::min<double>(top_, std::max(-low_, high_) / node.low);
  const double expected = 0.3 * static_cast<double>(count_) * codes * (node.high / node.low - 1);
  return expected <= 8 + static_cast<double>(count_) / 64;
}

void DiagonalScaleSearch::Offer(double scale, double error, int32_t zero) {
  if (scale <= 0 || !(error < best_error_)) return;
  best_error_ = error;
  best_.scale = static_cast<float>(scale);
  best_.zero = zero;
}

void DiagonalScaleSearch::Finish(double low, double high, int32_t zero) {
  ++finished_;
  if (low == 0) low = high;
  const double lowest = -zero;
  const double highest = top_ - zero;
  const double inverse_low = 1 / low;
  const double inverse_high = 1 / high;
  constexpr int64_t kSums = 8;
  double linear[kSums] = {};
  double energy[kSums] = {};
  double whole[kSums] = {};
  const int64_t padded = (count_ + kSums - 1) / kSums * kSums;
  codes_.resize(2 * static_cast<size_t>(padded));
  int32_t* at_low = codes_.data();
  int32_t* at_high = codes_.data() + padded;
  std::fill(at_low + count_, at_low + padded, 0);
  std::fill(at_high + count_, at_high + padded, 0);
  const auto clip = [lowest, highest](double x) {
    const double above = x > lowest ? x : lowest;
    return above < highest ? above : highest;
  };
  const auto add = [&](int64_t j, int64_t k) {
    const double w = row_[j];
    const double m = exact_[j];
    const double code = clip(std::nearbyint(w * inverse_low));
    at_low[j] = static_cast<int32_t>(code);
    at_high[j] = static_cast<int32_t>(clip(std::nearbyint(w * inverse_high)));
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
  const auto see = [&](int64_t j) {
    const double size = std::abs(static_cast<double>(row_[j]));
    for (int32_t code = std::abs(at_low[j]); code > std::abs(at_high[j]); --code) {
      events_.push_back({size / (code - 0.5), static_cast<int32_t>(j), code});
    }
  };
  for (int64_t begin = 0; begin < count_; begin += kSums) {
    // Few have a breakpoint: eight at once are passed over. What lies beyond the last is equal.
    if (std::memcmp(at_low + begin, at_high + begin, kSums * sizeof(int32_t)) == 0) continue;
    for (int64_t j = begin; j < std::min(begin + kSums, count_); ++j) {
      if (at_low[j] != at_high[j]) see(j);
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
      Offer(scale, c - 2 * scale * a + scale * scale * b, zero);
    }
  };
  double from = low;
  for (const Event& event : events_) {
    const double to = std::clamp(event.scale, from, high);
    minimise(from, to);
    const double m = exact_[event.feature];
    a -= m * std::abs(static_cast<double>(row_[event.feature]));
    b -= m * (2.0 * event.code - 1);
    from = to;
  }
  minimise(from, high);
  least_ = std::min(least_, best_error_ / (unit_ * unit_ * metric_unit_));
}

QuantParams DiagonalScaleSearch::Find(const float* weights, int64_t count,
                                      const DiagonalMetric& metric, int64_t first) {
  Vector<float> lows = {};
  Vector<float> highs = {};
  const auto see = [&](const Vector<float>& w) {
    lows = w < lows ? w : lows;
    highs = w > highs ? w : highs;
  };
  const int64_t whole_vectors = count / kLanes<float> * kLanes<float>;
  for (int64_t j = 0; j < whole_vectors; j += kLanes<float>) see(LoadVector(weights + j));
  Vector<float> rest = {};
  std::memcpy(&rest, weights + whole_vectors,
              static_cast<size_t>(count - whole_vectors) * sizeof(float));
  see(rest);
  float bottom = 0;
  float top = 0;
  for (int k = 0; k < kLanes<float>; ++k) {
    bottom = std::min(bottom, lows[k]);
    top = std::max(top, highs[k]);
  }
  low_ = bottom;
  high_ = top;
  const QuantParams whole = AbsmaxQuantParams(spec_, bottom, top);
  if (low_ == high_ || whole.vanishes || !std::isfinite(whole.scale)) return whole;
  const double largest = std::max(-low_, high_);
  // So that neither weights nor their inverse leave float32.
  unit_ = std::ldexp(1.0, std::clamp(std::ilogb(largest) + 1, -125, 126));
  row_ = weights;
  exact_ = metric.exact(first);
  metric_ = metric.scaled(first);
  metric_unit_ = metric.unit();
  Load(weights, count);
  heap_.clear();
  nodes_.clear();
  best_ = whole;
  best_error_ = std::numeric_limits<double>::infinity();
  least_ = std::numeric_limits<double>::infinity();
  const ZeroPoints allowed = AllowedZeroPoints(spec_);
  const Zeros zeros = {allowed.first, allowed.last, allowed.first, allowed.last};
  const Values at_zero = Evaluate(0, zeros);
  all_ = at_zero.of_first.error;
  if (!(all_ > 0) || !std::isfinite(all_)) return whole;

  // From where every code is 0 down.
  double high = std::min(RepresentableAbove(spec_.scale_dtype, 2.001 * largest),
                         RepresentableBelow(spec_.scale_dtype, 3 * largest));
  Values at_high = Evaluate(high, zeros);
  while (8.0 * high > static_cast<double>(whole.scale)) {
    const double low = RepresentableBelow(spec_.scale_dtype, 0.5 * high);
    if (low <= 0) break;
    const Values at_low = Evaluate(low, zeros);
    Push(low, high, zeros, &at_low, &at_high);
    high = low;
    at_high = at_low;
  }
  Push(0, high, zeros, &at_zero, &at_high);
  while (!heap_.empty() && heap_.front().bound <= least_) {
    std::pop_heap(heap_.begin(), heap_.end(), Entry::Later);
    // A copy: splitting it adds nodes.
    const Node node = nodes_[heap_.back().node];
    heap_.pop_back();
    if (!IsSmall(node)) {
      Split(node);
      continue;
    }
    if (node.bound_first <= least_) Finish(node.low, node.high, node.zeros.first);
    if (node.zeros.count() == 2 && node.bound_last <= least_) {
      Finish(node.low, node.high, node.zeros.last);
    }
  }
  return best_;
}

}  // namespace certiq::engine
