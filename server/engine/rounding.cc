#include "engine/rounding.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <mutex>

#include "engine/simd.h"

namespace certiq::engine {
namespace {

constexpr int64_t kWidth = kStrip<float>;
// Columns rounded one by one before the rest of their block hears of it.
constexpr int64_t kSubBlock = 16;
// Depth of a slice of the product: 256 x 128 float32 of U are 128 KiB, which
// stay in a second-level cache while the strips of a tile pass.
constexpr int64_t kDepth = 256;
// Rows of a task. More rows share each slice of U, fewer balance better.
constexpr int64_t kTileRows = 64;
static_assert(kTileRows % kWidth == 0 && kPanelRows % kSubBlock == 0 &&
              kSubBlock % kMicroRows == 0);

struct StripSums {
  double damped[kWidth] = {};
  double bound[kWidth] = {};
  double change[kWidth] = {};
  int32_t clipped[kWidth] = {};
  float overshoot[kWidth] = {};
};

// Scales and zero points of a strip's rows, [groups][kWidth]. Padding rows
// round zeros on a grid of step one.
struct StripGrid {
  std::vector<float> scale;
  std::vector<float> zero;
  float lowest;
  float highest;

  StripGrid(const Grid& grid, int64_t first_row)
      : scale(static_cast<size_t>(grid.groups * kWidth), 1.0f),
        zero(scale.size(), static_cast<float>(grid.lowest_code)),
        lowest(static_cast<float>(grid.lowest_code)),
        highest(static_cast<float>(grid.highest_code)) {
    for (int64_t r = first_row; r < std::min(first_row + kWidth, grid.rows); ++r) {
      for (int64_t g = 0; g < grid.groups; ++g) {
        const auto to = static_cast<size_t>(g * kWidth + r - first_row);
        scale[to] = grid.scale[static_cast<size_t>(r * grid.groups + g)];
        zero[to] = static_cast<float>(grid.zero[static_cast<size_t>(r * grid.groups + g)]);
      }
    }
  }
};

// Rounds column j of a strip: v to codes, w (replaced by w - q), and the sums.
void RoundColumn(const StripGrid& grid, int64_t group, double d, const float* v, float* w,
                 uint8_t* codes, StripSums& sums) {
  const float* scale = grid.scale.data() + group * kWidth;
  const float* zero = grid.zero.data() + group * kWidth;
  float error[kWidth];
  float widest[kWidth];
  float change[kWidth];
  int32_t code[kWidth];
  for (int64_t c = 0; c < kWidth; ++c) {
    const float free = FreeCode(v[c], scale[c], zero[c]);
    // Written so that NaN becomes the lowest code; the error then says so.
    const float above = free > grid.lowest ? free : grid.lowest;
    const float clamped = above < grid.highest ? above : grid.highest;
    const float q = scale[c] * (clamped - zero[c]);
    const float e = v[c] - q;
    const float half = 0.5f * scale[c];
    const float magnitude = std::abs(e);
    // v is a float32 sum: 2^-22 |v| covers its own rounding.
    widest[c] = std::max(half, magnitude) + 0x1p-22f * std::abs(v[c]);
    const bool clips = free != clamped && magnitude > half * (1.0f + 1e-6f);
    sums.clipped[c] += clips ? 1 : 0;
    sums.overshoot[c] = std::max(sums.overshoot[c], clips ? magnitude / scale[c] - 0.5f : 0.0f);
    error[c] = e;
    change[c] = w[c] - q;
    code[c] = static_cast<int32_t>(clamped);
  }
  for (int64_t c = 0; c < kWidth; ++c) {
    const double e = error[c];
    sums.damped[c] += d * (e * e);
  }
  for (int64_t c = 0; c < kWidth; ++c) {
    const double e = widest[c];
    sums.bound[c] += d * (e * e);
  }
  for (int64_t c = 0; c < kWidth; ++c) {
    const double e = change[c];
    sums.change[c] += e * e;
  }
  for (int64_t c = 0; c < kWidth; ++c) {
    w[c] = change[c];
    codes[c] = static_cast<uint8_t>(code[c]);
  }
}

// Rounds the columns of block b of one strip. `v` [kPanelRows][kWidth] holds
// w plus the feedback of all earlier blocks.
void RoundBlock(const ResolvedSpec& spec, const FeedbackColumns& u, int64_t b,
                const std::vector<double>& d, const StripGrid& grid, float* v, float* w,
                uint8_t* codes, StripSums& sums) {
  const int64_t begin = b * kPanelRows;
  const int64_t columns = std::min(kPanelRows, u.features() - begin);
  const float* square = u.block(b) + begin * kPanelRows;
  for (int64_t s0 = 0; s0 < columns; s0 += kSubBlock) {
    const int64_t s1 = std::min(s0 + kSubBlock, columns);
    for (int64_t j = s0; j < s1; ++j) {
      float* column = v + j * kWidth;
      for (int64_t k = s0; k < j; ++k) {
        const float feedback = square[k * kPanelRows + j];
        const float* change = w + k * kWidth;
        for (int64_t c = 0; c < kWidth; ++c) column[c] += feedback * change[c];
      }
      RoundColumn(grid, spec.GroupOf(begin + j), d[static_cast<size_t>(begin + j)], column,
                  w + j * kWidth, codes + j * kWidth, sums);
    }
    if (s1 < columns) {
      MultiplyIntoStrip(kPanelRows - s1, s1 - s0, square + s0 * kPanelRows + s1, kPanelRows, 1,
                        w + s0 * kWidth, v + s1 * kWidth);
    }
  }
}

}  // namespace

FeedbackColumns::FeedbackColumns(const Factor& factor, Executor& executor)
    : features_(factor.u.size()) {
  const UpperPanels<double>& u = factor.u;
  int64_t offset = 0;
  for (int64_t b = 0; b < u.panels(); ++b) {
    offsets_.push_back(offset);
    offset += u.end(b) * kPanelRows;
  }
  offsets_.push_back(offset);
  values_.resize(static_cast<size_t>(offset));
  executor.ParallelFor(u.panels(), [&](int64_t b) {
    float* to = values_.data() + offsets_[static_cast<size_t>(b)];
    for (int64_t k = 0; k < u.end(b); ++k) {
      for (int64_t j = std::max(k + 1, u.begin(b)); j < u.end(b); ++j) {
        to[k * kPanelRows + j - u.begin(b)] = static_cast<float>(u.at(k, j));
      }
    }
  });
}

int64_t FeedbackColumns::BytesFor(int64_t features) {
  int64_t rows = 0;
  for (int64_t begin = 0; begin < features; begin += kPanelRows) {
    rows += std::min(begin + kPanelRows, features);
  }
  return rows * kPanelRows * 4;
}

absl::StatusOr<Rounded> FeedbackSweep(const ResolvedSpec& spec, const FeedbackColumns& u,
                                      const std::vector<double>& bound_d, const Grid& grid,
                                      StripMatrix& weights, const RunContext& context) {
  const int64_t rows = weights.rows();
  const int64_t features = weights.features();
  Rounded result;
  result.codes.resize(static_cast<size_t>(rows * features));
  result.damped.resize(static_cast<size_t>(rows));
  result.bound.resize(static_cast<size_t>(rows));
  result.change.resize(static_cast<size_t>(rows));
  result.clipped.resize(static_cast<size_t>(rows));

  constexpr int64_t kTileStrips = kTileRows / kWidth;
  const int64_t tiles = (weights.strips() + kTileStrips - 1) / kTileStrips;
  std::mutex mutex;
  int64_t blocks_done = 0;

  context.executor->ParallelFor(tiles, [&](int64_t tile) {
    const int64_t first = tile * kTileStrips;
    const int64_t strips = std::min(kTileStrips, weights.strips() - first);
    std::vector<StripGrid> grids;
    for (int64_t s = 0; s < strips; ++s) grids.emplace_back(grid, (first + s) * kWidth);
    std::vector<StripSums> sums(static_cast<size_t>(strips));
    std::vector<float> v(static_cast<size_t>(strips * kPanelRows * kWidth));
    std::vector<uint8_t> codes(static_cast<size_t>(kPanelRows * kWidth));

    for (int64_t b = 0; b < u.blocks(); ++b) {
      if (context.cancelled()) return;
      const int64_t begin = b * kPanelRows;
      const int64_t columns = std::min(kPanelRows, features - begin);
      for (int64_t s = 0; s < strips; ++s) {
        std::copy_n(weights.strip(first + s) + begin * kWidth, columns * kWidth,
                    v.data() + s * kPanelRows * kWidth);
      }
      for (int64_t k0 = 0; k0 < begin; k0 += kDepth) {
        for (int64_t s = 0; s < strips; ++s) {
          MultiplyIntoStrip(kPanelRows, std::min(kDepth, begin - k0), u.block(b) + k0 * kPanelRows,
                            kPanelRows, 1, weights.strip(first + s) + k0 * kWidth,
                            v.data() + s * kPanelRows * kWidth);
        }
      }
      for (int64_t s = 0; s < strips; ++s) {
        const int64_t row = (first + s) * kWidth;
        RoundBlock(spec, u, b, bound_d, grids[static_cast<size_t>(s)],
                   v.data() + s * kPanelRows * kWidth, weights.strip(first + s) + begin * kWidth,
                   codes.data(), sums[static_cast<size_t>(s)]);
        for (int64_t c = 0; c < std::min(kWidth, rows - row); ++c) {
          uint8_t* to = result.codes.data() + (row + c) * features + begin;
          for (int64_t j = 0; j < columns; ++j) to[j] = codes[static_cast<size_t>(j * kWidth + c)];
        }
      }
      const std::lock_guard<std::mutex> lock(mutex);
      ++blocks_done;
      context.Report(Phase::kRound,
                     static_cast<double>(blocks_done) / static_cast<double>(tiles * u.blocks()));
    }

    double overshoot = 0;
    for (int64_t s = 0; s < strips; ++s) {
      const StripSums& sum = sums[static_cast<size_t>(s)];
      const int64_t row = (first + s) * kWidth;
      for (int64_t c = 0; c < std::min(kWidth, rows - row); ++c) {
        const auto r = static_cast<size_t>(row + c);
        result.damped[r] = sum.damped[c];
        result.bound[r] = sum.bound[c];
        result.change[r] = sum.change[c];
        result.clipped[r] = sum.clipped[c];
        overshoot = std::max(overshoot, static_cast<double>(sum.overshoot[c]));
      }
    }
    const std::lock_guard<std::mutex> lock(mutex);
    result.worst_overshoot = std::max(result.worst_overshoot, overshoot);
  });
  if (context.cancelled()) return context.CancellationStatus();
  return result;
}

}  // namespace certiq::engine
