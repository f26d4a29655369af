#include "engine/scales/qparams.h"

#include <algorithm>
#include <array>
#include <bit>
#include <cmath>
#include <limits>
#include <string>
#include <utility>

#include "absl/strings/str_cat.h"
#include "base/status.h"
#include "engine/kernels/simd.h"
#include "engine/scales/diagonal_scale_search.h"

namespace certiq::engine {
namespace {

// |x|^2.4 for x >= 0 to about 1e-6 relative, without branches or calls so
// that loops over it vectorise: 2^(1.2 log2(x^2)).
inline float Power24(float x) {
  const float square = x * x + 1e-30f;
  const auto bits = std::bit_cast<int32_t>(square);
  // Mantissa into [0.75, 1.5), where t below is at most 0.2.
  const int32_t shifted = bits - 0x3f400000;
  const int32_t exponent = shifted >> 23;
  const float m = std::bit_cast<float>(bits - (exponent << 23));
  const float t = (m - 1) / (m + 1);
  const float t2 = t * t;
  // log2(m) = 2 / ln 2 artanh(t).
  const float log2m = 2.8853900818f * t * (1 + t2 * (1.0f / 3 + t2 * (1.0f / 5 + t2 * (1.0f / 7))));
  const float y = 1.2f * (static_cast<float>(exponent) + log2m);
  const float whole = std::nearbyint(y);
  const float f = (y - whole) * 0.6931471806f;
  const float e =
      1 + f * (1 + f * (1.0f / 2 + f * (1.0f / 6 + f * (1.0f / 24 + f * (1.0f / 120 + f / 720)))));
  return e * std::bit_cast<float>((static_cast<int32_t>(whole) + 127) << 23);
}

// Values that are summed side by side. Independent partial sums: a float sum of a few thousand
// terms loses no digit that decides between candidates.
constexpr int64_t kStripes = 16;

// Sum of |term(i)|^2.4 over [0, count), given up as soon as it has reached `enough`. `term` may be
// asked for up to kStripes more.
template <typename Term>
double SumOfPowers(int64_t count, double enough, const Term& term) {
  // Terms between two looks at what the sum has reached.
  constexpr int64_t kChunk = 512;
  double sum = 0;
  for (int64_t i = 0; i < count;) {
    float parts[kStripes] = {};
    const int64_t stop = std::min(count, i + kChunk);
    for (; i + kStripes <= stop; i += kStripes) {
      for (int64_t k = 0; k < kStripes; ++k) parts[k] += Power24(std::abs(term(i + k)));
    }
    if (i < stop) {
      for (int64_t k = 0; k < kStripes; ++k) {
        const float power = Power24(std::abs(term(i + k)));
        parts[k] += i + k < stop ? power : 0.0f;
      }
      i = stop;
    }
    for (const float part : parts) sum += static_cast<double>(part);
    if (sum >= enough) break;
  }
  return sum;
}

// The values in rising order, and kStripes zeros. They are compared as integers, which have an
// order even where a value is not a number.
std::vector<float> Sorted(const float* values, int64_t count) {
  std::vector<uint32_t> keys(static_cast<size_t>(count));
  for (size_t i = 0; i < keys.size(); ++i) {
    const auto bits = std::bit_cast<uint32_t>(values[i]);
    keys[i] = bits ^ (bits >> 31 != 0 ? 0xffffffffu : 0x80000000u);
  }
  // By counting, a byte after the other; short runs are not worth the counters.
  constexpr size_t kWorthCounting = 256;
  if (keys.size() < kWorthCounting) {
    std::sort(keys.begin(), keys.end());
  } else {
    constexpr int kBytes = 4;
    std::array<std::array<uint32_t, 256>, kBytes> starts{};
    for (const uint32_t key : keys) {
      for (int b = 0; b < kBytes; ++b) ++starts[b][(key >> (8 * b)) & 255];
    }
    std::vector<uint32_t> moved(keys.size());
    for (int b = 0; b < kBytes; ++b) {
      uint32_t start = 0;
      for (uint32_t& at : starts[b]) start += std::exchange(at, start);
      for (const uint32_t key : keys) moved[starts[b][(key >> (8 * b)) & 255]++] = key;
      keys.swap(moved);
    }
  }
  std::vector<float> sorted(keys.size() + kStripes);
  for (size_t i = 0; i < keys.size(); ++i) {
    sorted[i] = std::bit_cast<float>(keys[i] ^ (keys[i] >> 31 != 0 ? 0x80000000u : 0xffffffffu));
  }
  return sorted;
}

// sum |w - q|^2.4 over values on grids of one scale, in units of a larger one. Weights that a grid
// clips are the first and the last of the sorted values; what the others cost does not depend on
// the zero point, and neither does which of the levels a weight would take on a grid without end.
class ShrinkLoss {
 public:
  // `sorted` as Sorted makes it.
  ShrinkLoss(const std::vector<float>& sorted, int bits, float scale, float unit)
      : values_(sorted.data()),
        count_(std::ssize(sorted) - kStripes),
        top_((1 << bits) - 1),
        inverse_(1 / scale),
        scaled_(scale / unit) {}

  // What weights below the lowest level, and those above the highest, cost with this zero point.
  double Below(int32_t zero) const { return Clipped(0, First(-zero), -zero); }
  double Above(int32_t zero) const { return Clipped(First(top_ - zero + 1), count_, top_ - zero); }
  // What the others cost, given up where it has reached `enough`.
  double Inside(int32_t zero, double enough) const {
    const int64_t begin = First(-zero);
    return SumOfPowers(First(top_ - zero + 1) - begin, enough, [&](int64_t i) {
      const float x = values_[begin + i] * inverse_;
      return (x - std::nearbyint(x)) * scaled_;
    });
  }

  // How much the loss changes from one zero point to the next larger one: weights that were below
  // come nearer, those that the highest level was nearest to, or that were above, go farther away.
  double Step(int32_t zero) const {
    const int64_t below = First(-zero);
    const int64_t highest = First(top_ - zero);
    return Clipped(0, below, -zero - 1) - Clipped(0, below, -zero) +
           Clipped(highest, count_, top_ - zero - 1) - Clipped(highest, count_, top_ - zero);
  }

 private:
  // The first value nearest to level `level` or one above it.
  int64_t First(int32_t level) const {
    const auto least = static_cast<float>(level);
    return std::partition_point(
               values_, values_ + count_,
               [&](float value) { return std::nearbyint(value * inverse_) < least; }) -
           values_;
  }
  double Clipped(int64_t begin, int64_t end, int32_t level) const {
    const auto at = static_cast<float>(level);
    return SumOfPowers(end - begin, std::numeric_limits<double>::infinity(),
                       [&](int64_t i) { return (values_[begin + i] * inverse_ - at) * scaled_; });
  }

  const float* values_;
  int64_t count_;
  int32_t top_;
  float inverse_;
  float scaled_;
};

// Neighbouring scale trials lie this factor apart.
constexpr double kTrialFactor = 1.02;

// Whether there is a scale that a search can start from.
bool Holds(QuantParams params) {
  return params.scale > 0 && std::isfinite(params.scale) && !params.vanishes;
}

double TopCode(const ResolvedSpec& spec) { return std::ldexp(1.0, spec.bits) - 1; }

// What the steps of (S1) have to span together.
double SpanOf(const ResolvedSpec& spec, float low, float high) {
  const double bottom = low;
  const double top = high;
  return spec.symmetric ? 2 * std::max(-bottom, top) : top - bottom;
}

std::string GroupName(const ResolvedSpec& spec, int64_t row, int64_t group) {
  return spec.group_size == 0 ? absl::StrCat("row ", row)
                              : absl::StrCat("row ", row, ", group ", group);
}

}  // namespace

float LeastScale(DType scale_dtype) {
  return scale_dtype == DType::kF16 ? 0x1p-14f : std::numeric_limits<float>::min();
}

QuantParams AbsmaxQuantParams(const ResolvedSpec& spec, float low, float high) {
  const double levels = TopCode(spec);
  const double bottom = low;
  const double span = SpanOf(spec, low, high);
  QuantParams params;
  params.scale = span == 0 ? 1.0f : RoundTo(spec.scale_dtype, static_cast<float>(span / levels));
  if (spec.symmetric) {
    params.zero = 1 << (spec.bits - 1);
  } else if (Holds(params)) {
    // The quotient may pass the top code by the rounding of the scale.
    params.zero = static_cast<int32_t>(
        std::clamp(std::nearbyint(-bottom / static_cast<double>(params.scale)), 0.0, levels));
  }
  const int32_t furthest = std::max(params.zero, static_cast<int32_t>(levels) - params.zero);
  if (RoundTo(spec.LevelType(), params.scale * static_cast<float>(furthest)) == 0) {
    return {LeastScale(spec.scale_dtype), 1 << (spec.bits - 1), /*vanishes=*/true};
  }
  return params;
}

ZeroPoints AllowedZeroPoints(const ResolvedSpec& spec) {
  const int32_t middle = 1 << (spec.bits - 1);
  if (!spec.symmetric) return {0, (1 << spec.bits) - 1};
  return {spec.signed_scales ? middle - 1 : middle, middle};
}

QuantParams FitQuantParams(const ResolvedSpec& spec, const float* values, int64_t count) {
  float low = 0;
  float high = 0;
  for (int64_t i = 0; i < count; ++i) {
    low = std::min(low, values[i]);
    high = std::max(high, values[i]);
  }
  const QuantParams whole = AbsmaxQuantParams(spec, low, high);
  if (spec.scale != ScaleRule::kMse || !Holds(whole) || low == high) return whole;
  const std::vector<float> sorted = Sorted(values, count);
  const ZeroPoints allowed = AllowedZeroPoints(spec);
  QuantParams best = whole;
  double least = std::numeric_limits<double>::infinity();
  int32_t zero = whole.zero;
  for (int shrink = 0; shrink < 80; ++shrink) {
    const float p = 1 - static_cast<float>(shrink) / 100;
    const float scale = AbsmaxQuantParams(spec, p * low, p * high).scale;
    // Of a scale and its mirror image the former is preferred.
    if (spec.symmetric) zero = whole.zero;
    if (!Holds({scale, zero})) break;
    const ShrinkLoss loss(sorted, spec.bits, scale, whole.scale);
    const double below = loss.Below(zero);
    const double above = loss.Above(zero);
    // A grid of this or a smaller scale that moves up from here clips at least what is below now,
    // one that moves down at least what is above; one that stays both.
    const bool stays = allowed.first == allowed.last;
    if ((stays ? below + above : std::min(below, above)) >= least) break;
    // Nor does a zero point save more than what the grid clips on one side.
    const double saved = std::max(below, above);
    const double inside = loss.Inside(zero, least + saved - below - above);
    double total = below + above + inside;
    if (total - saved >= least) continue;
    // What clipping adds to a weight's loss is convex in the zero point, and so is the sum: a zero
    // point that neither neighbour betters is the best one for the scale.
    const int32_t from = zero;
    if (total - below < least) {
      while (zero < allowed.last && loss.Step(zero) < 0) ++zero;
    }
    if (zero == from && total - above < least) {
      while (zero > allowed.first && loss.Step(zero - 1) > 0) --zero;
    }
    if (zero != from) total = loss.Below(zero) + loss.Above(zero) + loss.Inside(zero, least);
    if (total >= least) continue;
    least = total;
    best = {scale, zero};
  }
  return best;
}

QuantParams StretchedQuantParams(const ResolvedSpec& spec, QuantParams params, float multiplier) {
  if (params.vanishes) return params;
  const QuantParams stretched = {RoundTo(spec.scale_dtype, params.scale * multiplier), params.zero};
  return Holds(stretched) ? stretched : params;
}

std::vector<float> TrialMultipliers(int32_t n) {
  std::vector<float> multipliers;
  if (n <= 1) return multipliers;
  multipliers.push_back(1);
  for (int32_t i = 1; i < n; ++i) {
    const int32_t away = (i + 1) / 2;
    multipliers.push_back(static_cast<float>(std::pow(kTrialFactor, i % 2 == 1 ? -away : away)));
  }
  return multipliers;
}

Grid MakeGrid(const ResolvedSpec& spec, int64_t rows, int64_t features,
              const std::vector<int64_t>& order) {
  Grid grid;
  grid.rows = rows;
  grid.groups = spec.Groups(features);
  grid.highest_code = (1 << spec.bits) - 1;
  grid.level_type = spec.LevelType();
  grid.scale.assign(static_cast<size_t>(rows * grid.groups), 1.0f);
  grid.zero.assign(grid.scale.size(), spec.symmetric ? 1 << (spec.bits - 1) : 0);
  grid.vanishes.assign(grid.scale.size(), 0);
  grid.group_of.resize(static_cast<size_t>(features));
  for (int64_t j = 0; j < features; ++j) {
    const int64_t at = spec.group_scales == GroupScales::kDynamic || order.empty()
                           ? j
                           : order[static_cast<size_t>(j)];
    grid.group_of[static_cast<size_t>(j)] = static_cast<int32_t>(spec.GroupOf(at));
  }
  return grid;
}

namespace {

// (S1) for the rows of one strip, side by side.
void FillAbsmax(const ResolvedSpec& spec, const float* strip, int64_t first_row, Grid& grid) {
  constexpr int64_t kWidth = kStrip<float>;
  std::vector<float> low(static_cast<size_t>(grid.groups * kWidth));
  std::vector<float> high(low.size());
  for (size_t j = 0; j < grid.group_of.size(); ++j) {
    const float* values = strip + static_cast<int64_t>(j) * kWidth;
    float* lowest = low.data() + grid.group_of[j] * kWidth;
    float* highest = high.data() + grid.group_of[j] * kWidth;
    for (int64_t c = 0; c < kWidth; ++c) {
      lowest[c] = std::min(lowest[c], values[c]);
      highest[c] = std::max(highest[c], values[c]);
    }
  }
  for (int64_t c = 0; c < std::min(kWidth, grid.rows - first_row); ++c) {
    for (int64_t g = 0; g < grid.groups; ++g) {
      const auto from = static_cast<size_t>(g * kWidth + c);
      const auto to = static_cast<size_t>((first_row + c) * grid.groups + g);
      grid.Set(to, AbsmaxQuantParams(spec, low[from], high[from]));
    }
  }
}

}  // namespace

void FillQuantParams(const ResolvedSpec& spec, const StripMatrix& weights,
                     const RunContext& context, Grid& grid, const ScaleMetric& metric) {
  if (spec.grid != nullptr) {
    grid.scale = spec.grid->scales;
    if (!spec.symmetric) grid.zero = spec.grid->zero_points;
    grid.lowest_code = spec.grid->lowest_code.value_or(grid.lowest_code);
    grid.highest_code = spec.grid->highest_code.value_or(grid.highest_code);
    return;
  }
  const int64_t features = weights.features();
  std::vector<int64_t> first(static_cast<size_t>(grid.groups) + 1);
  for (const int32_t g : grid.group_of) ++first[static_cast<size_t>(g) + 1];
  for (size_t g = 1; g < first.size(); ++g) first[g] += first[g - 1];

  // Group by group: where each feature comes to lie.
  std::vector<int64_t> place(grid.group_of.size());
  std::vector<int64_t> next = first;
  for (size_t j = 0; j < place.size(); ++j) {
    place[j] = next[static_cast<size_t>(grid.group_of[j])]++;
  }
  DiagonalMetric diagonal;
  if (HasMetric(spec.scale)) {
    std::vector<double> grouped(place.size());
    for (size_t j = 0; j < place.size(); ++j) {
      grouped[static_cast<size_t>(place[j])] = metric.diagonal[j];
    }
    diagonal = DiagonalMetric(std::move(grouped));
  }
  ResolvedSpec absmax = spec;
  absmax.scale = ScaleRule::kAbsmax;

  const int64_t width = StripMatrix::StripRows();
  context.executor->ParallelFor(weights.strips(), [&](int64_t s) {
    // A shrink search takes as long as 80 roundings; the caller asks whether it ended.
    if (context.cancelled()) return;
    if (spec.scale == ScaleRule::kAbsmax || metric.searched_groups <= 0) {
      FillAbsmax(spec, weights.strip(s), s * width, grid);
      return;
    }
    DiagonalScaleSearch search(spec);
    const int64_t live = std::min(width, grid.rows - s * width);
    std::vector<float> grouped(static_cast<size_t>(live * features));
    for (int64_t j = 0; j < features; ++j) {
      const float* column = weights.strip(s) + j * width;
      float* to = grouped.data() + place[static_cast<size_t>(j)];
      for (int64_t c = 0; c < live; ++c) to[c * features] = column[c];
    }
    for (int64_t c = 0; c < live; ++c) {
      for (int64_t g = 0; g < grid.groups; ++g) {
        const auto begin = first[static_cast<size_t>(g)];
        const float* values = grouped.data() + c * features + begin;
        const int64_t count = first[static_cast<size_t>(g) + 1] - begin;
        const bool searched = g < metric.searched_groups;
        const QuantParams params = searched && HasMetric(spec.scale)
                                       ? search.Find(values, count, diagonal, begin)
                                       : FitQuantParams(searched ? spec : absmax, values, count);
        grid.Set(static_cast<size_t>((s * width + c) * grid.groups + g), params);
      }
    }
  });
}

void TurnMirrored(const ResolvedSpec& spec, Executor& executor, Grid& grid,
                  UnsetVector<uint8_t>& codes) {
  if (!spec.signed_scales) return;
  const int32_t middle = 1 << (spec.bits - 1);
  const auto top = static_cast<uint8_t>((1 << spec.bits) - 1);
  const auto features = static_cast<int64_t>(grid.group_of.size());
  executor.ParallelFor(grid.rows, [&](int64_t r) {
    const int32_t* zeros = grid.zero.data() + r * grid.groups;
    if (std::all_of(zeros, zeros + grid.groups, [=](int32_t z) { return z == middle; })) return;
    uint8_t* row = codes.data() + r * features;
    for (int64_t j = 0; j < features; ++j) {
      const bool mirrored = zeros[grid.group_of[static_cast<size_t>(j)]] != middle;
      if (mirrored) row[j] = static_cast<uint8_t>(top - row[j]);
    }
    for (int64_t at = r * grid.groups; at < (r + 1) * grid.groups; ++at) {
      int32_t& zero = grid.zero[static_cast<size_t>(at)];
      if (zero == middle) continue;
      grid.scale[static_cast<size_t>(at)] = -grid.scale[static_cast<size_t>(at)];
      zero = middle;
    }
  });
}

absl::Status CheckScales(const ResolvedSpec& spec, const Grid& grid,
                         const std::vector<int64_t>& row_names) {
  for (size_t at = 0; at < grid.scale.size(); ++at) {
    if (grid.scale[at] > 0 && std::isfinite(grid.scale[at])) continue;
    const auto groups = static_cast<size_t>(grid.groups);
    const size_t row = at / groups;
    return base::InvalidField(
        "spec.scale_dtype",
        absl::StrCat("the scale of ",
                     GroupName(spec, row_names.empty() ? static_cast<int64_t>(row) : row_names[row],
                               static_cast<int64_t>(at % groups)),
                     " does not fit ", Name(spec.scale_dtype), ": it rounds to ", grid.scale[at]));
  }
  return absl::OkStatus();
}

absl::Status CheckRange(const ResolvedSpec& spec, const StripMatrix& weights,
                        const std::vector<bool>& dead) {
  if (spec.grid != nullptr) return absl::OkStatus();
  // No span is more than twice the largest weight: few layers need a second look.
  float largest = 0;
  for (int64_t s = 0; s < weights.strips(); ++s) {
    const float* values = weights.strip(s);
    for (int64_t i = 0; i < weights.features() * StripMatrix::StripRows(); ++i) {
      largest = std::max(largest, std::abs(values[i]));
    }
  }
  const double most = 2 * static_cast<double>(largest) / TopCode(spec);
  if (std::isfinite(RoundTo(spec.scale_dtype, static_cast<float>(most)))) return absl::OkStatus();

  const bool groups_known = spec.order == Order::kNatural ||
                            spec.group_scales == GroupScales::kStatic || spec.group_size == 0;
  const int64_t group_size =
      !groups_known ? 1 : (spec.group_size == 0 ? weights.features() : spec.group_size);
  std::vector<float> row(static_cast<size_t>(weights.features()));
  for (int64_t r = 0; r < weights.rows(); ++r) {
    weights.GetRow(r, row.data());
    for (size_t j = 0; j < row.size(); ++j) row[j] = dead[j] ? 0 : row[j];
    for (int64_t first = 0; first < weights.features(); first += group_size) {
      const auto begin = row.begin() + first;
      const auto end = row.begin() + std::min(weights.features(), first + group_size);
      const float low = std::min(0.0f, *std::min_element(begin, end));
      const float high = std::max(0.0f, *std::max_element(begin, end));
      const QuantParams params = AbsmaxQuantParams(spec, low, high);
      if (std::isfinite(params.scale)) continue;
      const bool negative = -low > high;
      const auto at = std::find(begin, end, negative ? low : high);
      return base::InvalidField(
          "spec.scale_dtype",
          absl::StrCat(GroupName(spec, r, groups_known ? first / group_size : 0),
                       " has a weight of ", *at, " (column ", at - row.begin(),
                       "), which asks for a scale of ", SpanOf(spec, low, high) / TopCode(spec),
                       ": ", Name(spec.scale_dtype), " holds less; BF16 and F32, which no GPTQ ",
                       "format stores, hold it"));
    }
  }
  return absl::OkStatus();
}

}  // namespace certiq::engine
