#include "engine/scales/piso_row.h"

#include <algorithm>
#include <cmath>
#include <limits>

#include "engine/scales/column_accumulator.h"
#include "engine/scales/diagonal_scale_search.h"

namespace certiq::engine {
namespace {

constexpr int64_t kWidth = PackedMetric::kWidth;

}  // namespace

void PisoRowSearch::Begin(int64_t count, const double* weights, const double* linear,
                          QuantParams start) {
  count_ = count;
  w_ = weights;
  const auto n = static_cast<size_t>(count);
  linear_.assign(n, 0);
  if (linear != nullptr) std::copy_n(linear, n, linear_.begin());
  const int64_t padded = (count + kWidth - 1) / kWidth * kWidth;
  image_.assign(static_cast<size_t>(padded), 0);
  start_image_.assign(image_.size(), 0);
  diagonal_.assign(image_.size(), 0);
  start_codes_.resize(n);
  best_ = start;
  const double lowest = -start.zero;
  const double highest = (1 << spec_.bits) - 1 - start.zero;
  for (size_t j = 0; j < n; ++j) {
    start_codes_[j] =
        std::clamp(std::nearbyint(weights[j] / static_cast<double>(start.scale)), lowest, highest);
  }
}

void PisoRowSearch::Weigh(const float* slice, int64_t t) {
  ColumnAccumulator image;
  ColumnAccumulator codes;
  for (int64_t i = 0; i < count_; ++i) {
    const float* row = slice + i * kWidth;
    image.Add(w_[i], row);
    codes.Add(start_codes_[static_cast<size_t>(i)], row);
    if (i / kWidth == t) diagonal_[static_cast<size_t>(i)] = row[i % kWidth];
  }
  image.Store(image_.data() + t * kWidth);
  codes.Store(start_image_.data() + t * kWidth);
}

int32_t PisoRowSearch::first_zero() const { return AllowedZeroPoints(spec_).first; }
int32_t PisoRowSearch::last_zero() const { return AllowedZeroPoints(spec_).last; }

bool PisoRowSearch::Excluded(double scale, int32_t zero) const {
  const double above = (1 << spec_.bits) - 1 - zero;
  const double below = zero;
  // The best t depends on what y adds; each is valid.
  constexpr double kShares[] = {0.125, 0.25, 0.5, 0.75, 1};
  double bounds[std::size(kShares)] = {};
  for (int64_t j = 0; j < count_; ++j) {
    const auto at = static_cast<size_t>(j);
    const double size = std::abs(w_[j]);
    const double sign = w_[j] < 0 ? -1 : 1;
    const double reach = std::min(scale * (w_[j] < 0 ? below : above), size + 0.5 * scale);
    const double left = size == 0 ? 0 : size - reach;
    for (size_t i = 0; i < std::size(kShares); ++i) {
      const double slope = sign * (kShares[i] * image_[at] + linear_[at]);
      bounds[i] += std::min(slope * left, slope * size);
    }
  }
  for (size_t i = 0; i < std::size(kShares); ++i) {
    const double bound = 2 * bounds[i] - kShares[i] * kShares[i] * square_;
    // What rounding may have added.
    if (bound - 1e-10 * (square_ + std::abs(constant_)) > best_error_) return true;
  }
  return false;
}

double PisoRowSearch::Stop(int32_t zero) const {
  double included = top_;
  if (Excluded(included, zero)) return included;
  double excluded = top_ * 0x1p-20;
  if (!Excluded(excluded, zero)) return 0;
  for (int step = 0; step < 9; ++step) {
    const double middle = std::sqrt(included * excluded);
    (Excluded(middle, zero) ? excluded : included) = middle;
  }
  return excluded;
}

void PisoRowSearch::Sort() {
  double a = 0;
  double b = 0;
  square_ = 0;
  constant_ = 0;
  top_ = 0;
  for (int64_t j = 0; j < count_; ++j) {
    const auto at = static_cast<size_t>(j);
    square_ += w_[j] * image_[at];
    constant_ += w_[j] * (image_[at] + 2 * linear_[at]);
    a += (image_[at] + linear_[at]) * start_codes_[at];
    b += start_image_[at] * start_codes_[at];
    top_ = std::max(top_, std::abs(w_[j]));
  }
  const double scale = best_.scale;
  best_error_ = constant_ - 2 * scale * a + scale * scale * b;
  // Above, every code is 0.
  top_ *= 2.001;
  sorted_.clear();
  stops_.clear();
  double least = top_;
  int32_t deepest = 0;
  int32_t highest = 0;
  for (int32_t zero = first_zero(); zero <= last_zero(); ++zero) {
    stops_.push_back(top_ > 0 ? Stop(zero) : top_);
    if (stops_.back() >= top_) continue;
    least = std::min(least, stops_.back());
    deepest = std::max(deepest, zero);
    highest = std::max(highest, (1 << spec_.bits) - 1 - zero);
  }
  for (int64_t j = 0; j < count_; ++j) {
    const double size = std::abs(w_[j]);
    if (size == 0) continue;
    const int32_t codes = w_[j] < 0 ? deepest : highest;
    for (int32_t t = 1; t <= codes; ++t) {
      const double at = size / (t - 0.5);
      if (at <= least) break;
      sorted_.push_back({at, static_cast<int32_t>(j), static_cast<int16_t>(t),
                         static_cast<int16_t>(w_[j] < 0 ? -1 : 1)});
    }
  }
  std::sort(sorted_.begin(), sorted_.end(), [](const Breakpoint& x, const Breakpoint& y) {
    return x.scale != y.scale ? x.scale > y.scale : x.feature < y.feature;
  });
}

bool PisoRowSearch::Select(int32_t zero) {
  zero_ = zero;
  const double stop = stops_[static_cast<size_t>(zero - first_zero())];
  if (stop >= top_) return false;
  const int32_t above = (1 << spec_.bits) - 1 - zero;
  crossed_.clear();
  for (const Breakpoint& at : sorted_) {
    if (at.scale <= stop) break;
    if (at.code <= (at.sign < 0 ? zero : above)) crossed_.push_back(at);
  }
  crossings_ += static_cast<int64_t>(crossed_.size());
  met_.resize(crossed_.size());
  return true;
}

void PisoRowSearch::Stream(const float* slice, int64_t t) {
  ColumnAccumulator sums;
  alignas(kVectorBytes) double stored[kWidth];
  const int64_t first = t * kWidth;
  for (size_t m = 0; m < crossed_.size(); ++m) {
    const Breakpoint& at = crossed_[m];
    const auto lane = static_cast<uint64_t>(at.feature - first);
    if (lane < kWidth) {
      sums.Store(stored);
      met_[m] = stored[lane];
    }
    sums.Add(at.sign, slice + at.feature * kWidth);
  }
}

void PisoRowSearch::Offer(double scale, double a, double b) {
  const double error = constant_ - 2 * scale * a + scale * scale * b;
  if (!(error < best_error_)) return;
  best_error_ = error;
  best_ = {static_cast<float>(scale), zero_};
}

void PisoRowSearch::MinimiseBetween(double from, double to, double a, double b) {
  if (b > 0 && constant_ - a * (a / b) >= best_error_) return;
  const double aim = b > 0 ? std::clamp(a / b, from, to) : (a > 0 ? to : from);
  const DType type = spec_.scale_dtype;
  double below = RepresentableBelow(type, aim);
  if (below >= to) below = RepresentableBelow(type, std::nextafter(to, 0.0));
  double above = RepresentableAbove(type, aim);
  if (above <= from) {
    above = RepresentableAbove(type, std::nextafter(from, std::numeric_limits<double>::infinity()));
  }
  if (below > from && below < to) Offer(below, a, b);
  if (above > from && above < to && above != below) Offer(above, a, b);
}

void PisoRowSearch::Minimise() {
  double a = 0;
  double b = 0;
  const double stop = stops_[static_cast<size_t>(zero_ - first_zero())];
  double to = std::numeric_limits<double>::infinity();
  for (size_t m = 0; m < crossed_.size(); ++m) {
    const Breakpoint& at = crossed_[m];
    if (at.scale < to) MinimiseBetween(at.scale, std::min(to, top_), a, b);
    to = at.scale;
    const auto i = static_cast<size_t>(at.feature);
    a += at.sign * (image_[i] + linear_[i]);
    b += 2 * at.sign * met_[m] + diagonal_[i];
  }
  MinimiseBetween(stop, std::min(to, top_), a, b);
}

int64_t PisoRowSearch::BytesFor(const ResolvedSpec& spec, int64_t count) {
  const int64_t codes = spec.symmetric ? 1 << (spec.bits - 1) : (1 << spec.bits) - 1;
  // Vectors grow by doubling; `sorted_` has what both signs may need.
  constexpr auto kEach = static_cast<int64_t>(4 * sizeof(Breakpoint) + sizeof(double));
  return count * codes * kEach + count * 64;
}

}  // namespace certiq::engine
