#include "engine/rounding.h"

#include <algorithm>
#include <cmath>
#include <mutex>

#include "engine/code_strip.h"
#include "engine/simd.h"

namespace certiq::engine {
namespace {

// Columns rounded one by one before the rest of their block hears of it.
constexpr int64_t kSubBlock = 16;
// Depth of a slice of the product: 256 x 128 float32 of U are 128 KiB, which
// stay in a second-level cache while the strips of a tile pass.
constexpr int64_t kDepth = 256;
// Rows of a task. More rows share each slice of U, fewer balance better.
constexpr int64_t kTileRows = 64;
static_assert(kTileRows % kStripRows == 0);

// The sweep over one strip of rows. `w` is the strip of targets, which turns
// into targets minus levels from the left; `v` [kPanelRows][kStripRows] is
// the block being rounded, targets plus the feedback heard so far.
class StripSweep {
 public:
  StripSweep(const ResolvedSpec& spec, const SweepRules& rules, const FeedbackColumns& u,
             const std::vector<double>& d, const Grid& grid, int64_t first_row, float* w)
      : spec_(spec),
        rules_(rules),
        u_(u),
        d_(d),
        group_of_(grid.group_of),
        first_row_(first_row),
        steps_(grid, first_row),
        w_(w),
        v_(static_cast<size_t>(kPanelRows * kStripRows)),
        codes_(static_cast<size_t>(kPanelRows * kStripRows)) {}

  // Loads the targets of block b.
  void Begin(int64_t b) {
    begin_ = b * kPanelRows;
    columns_ = std::min(kPanelRows, u_.features() - begin_);
    std::copy_n(w_ + begin_ * kStripRows, columns_ * kStripRows, v_.data());
  }

  // Adds the feedback of columns [k0, k0 + depth), all before the block.
  void Hear(int64_t b, int64_t k0, int64_t depth) {
    MultiplyIntoStrip(kPanelRows, depth, u_.block(b) + k0 * kPanelRows, kPanelRows, 1,
                      w_ + k0 * kStripRows, v_.data());
  }

  // Rounds the block's columns.
  void Round(int64_t b) {
    const float* square = u_.block(b) + begin_ * kPanelRows;
    float* w = w_ + begin_ * kStripRows;
    int64_t s0 = 0;
    while (s0 < columns_) {
      if (StartsDynamicGroup(begin_ + s0)) FitGroup(b, s0);
      int64_t s1 = s0;
      // A sub-block ends where a dynamic group starts: its step needs all feedback.
      do {
        RoundColumn(square, s0, s1, w);
        ++s1;
      } while (s1 < std::min(s0 + kSubBlock, columns_) && !StartsDynamicGroup(begin_ + s1));
      if (s1 < columns_) {
        MultiplyIntoStrip(kPanelRows - s1, s1 - s0, square + s0 * kPanelRows + s1, kPanelRows, 1,
                          w + s0 * kStripRows, v_.data() + s1 * kStripRows);
      }
      s0 = s1;
    }
  }

  const StripSums& sums() const { return sums_; }
  const StripGrid& steps() const { return steps_; }
  // Codes of the block, [columns][kStripRows].
  const uint8_t* codes() const { return codes_.data(); }

 private:
  bool StartsDynamicGroup(int64_t column) const {
    const int32_t group = group_of_[static_cast<size_t>(column)];
    return group >= rules_.first_dynamic_group &&
           (column == 0 || group_of_[static_cast<size_t>(column - 1)] != group);
  }

  void RoundColumn(const float* square, int64_t s0, int64_t j, float* w) {
    float* v = v_.data() + j * kStripRows;
    for (int64_t k = s0; k < j; ++k) {
      const float feedback = square[k * kPanelRows + j];
      const float* change = w + k * kStripRows;
      for (int64_t c = 0; c < kStripRows; ++c) v[c] += feedback * change[c];
    }
    const int64_t column = begin_ + j;
    const int64_t group = group_of_[static_cast<size_t>(column)];
    float code[kStripRows];
    float level[kStripRows];
    if (spec_.rounding == Rounding::kNearest) {
      NearestCodes(steps_, group, v, code);
    } else {
      const int64_t original = rules_.order == nullptr || rules_.order->empty()
                                   ? column
                                   : (*rules_.order)[static_cast<size_t>(column)];
      StochasticCodes(steps_, group, v, spec_.seed, first_row_, original, code);
    }
    AddRounded(steps_, group, spec_.rounding, d_[static_cast<size_t>(column)], v, code, level,
               sums_);
    float* target = w + j * kStripRows;
    for (int64_t c = 0; c < kStripRows; ++c) target[c] -= level[c];
    uint8_t* codes = codes_.data() + j * kStripRows;
    for (int64_t c = 0; c < kStripRows; ++c) {
      codes[c] = static_cast<uint8_t>(static_cast<int32_t>(code[c]));
    }
  }

  // The step of the group that starts at column s0 of block b, from the
  // updated weights v* = t + P U_gg^-1.
  void FitGroup(int64_t b, int64_t s0) {
    const int64_t start = begin_ + s0;
    const int32_t group = group_of_[static_cast<size_t>(start)];
    int64_t end = start;
    while (end < u_.features() && group_of_[static_cast<size_t>(end)] == group) ++end;
    // P; the block at hand has heard everything before `start`, later ones nothing.
    std::vector<float> moved(static_cast<size_t>((end - start + kPanelRows) * kStripRows));
    for (int64_t block = b; block * kPanelRows < end; ++block) {
      const int64_t from = std::max(start, block * kPanelRows);
      const int64_t to = std::min(end, (block + 1) * kPanelRows);
      float* p = moved.data() + (from - start) * kStripRows;
      if (block == b) {
        for (int64_t i = 0; i < (to - from) * kStripRows; ++i) {
          p[i] =
              v_[static_cast<size_t>((from - begin_) * kStripRows + i)] - w_[from * kStripRows + i];
        }
      } else {
        MultiplyIntoStrip(to - from, start, u_.block(block), kPanelRows, 1, w_, p);
      }
    }
    // x U_gg = P from the left, in place.
    for (int64_t j = 1; j < end - start; ++j) {
      const int64_t block = (start + j) / kPanelRows;
      const float* u = u_.block(block) + start * kPanelRows + (start + j - block * kPanelRows);
      float* x = moved.data() + j * kStripRows;
      for (int64_t k = 0; k < j; ++k) {
        const float feedback = u[k * kPanelRows];
        for (int64_t c = 0; c < kStripRows; ++c)
          x[c] -= feedback * moved[static_cast<size_t>(k * kStripRows + c)];
      }
    }
    std::vector<float> updated(static_cast<size_t>(end - start));
    for (int64_t c = 0; c < kStripRows; ++c) {
      for (int64_t j = 0; j < end - start; ++j) {
        updated[static_cast<size_t>(j)] =
            w_[(start + j) * kStripRows + c] + moved[static_cast<size_t>(j * kStripRows + c)];
      }
      steps_.Set(group, c, FitStep(spec_, updated.data(), end - start));
    }
  }

  const ResolvedSpec& spec_;
  const SweepRules& rules_;
  const FeedbackColumns& u_;
  const std::vector<double>& d_;
  const std::vector<int32_t>& group_of_;
  int64_t first_row_;
  StripGrid steps_;
  float* w_;
  std::vector<float> v_;
  std::vector<uint8_t> codes_;
  StripSums sums_;
  int64_t begin_ = 0;
  int64_t columns_ = 0;
};

// Copies what a strip's sweep found into the layer's results.
void Collect(const StripSweep& sweep, int64_t first_row, int64_t live, bool dynamic, Grid& grid,
             Rounded& result) {
  const StripSums& sums = sweep.sums();
  for (int64_t c = 0; c < live; ++c) {
    const auto r = static_cast<size_t>(first_row + c);
    result.damped[r] = sums.damped[c];
    result.bound[r] = sums.bound[c];
    result.clipped[r] = sums.clipped[c];
    result.widest[r] = sums.widest[c];
    result.clipped_reach[r] = sums.clipped_reach[c];
    if (!dynamic) continue;
    for (int64_t g = 0; g < grid.groups; ++g) {
      const auto from = static_cast<size_t>(g * kStripRows + c);
      const auto to = static_cast<size_t>((first_row + c) * grid.groups + g);
      grid.scale[to] = sweep.steps().scale[from];
      grid.zero[to] = static_cast<int32_t>(sweep.steps().zero[from]);
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

absl::StatusOr<Rounded> FeedbackSweep(const ResolvedSpec& spec, const SweepRules& rules,
                                      const FeedbackColumns& u, const std::vector<double>& bound_d,
                                      Grid& grid, StripMatrix& targets, const RunContext& context) {
  const int64_t rows = targets.rows();
  const int64_t features = targets.features();
  Rounded result;
  result.codes.resize(static_cast<size_t>(rows * features));
  for (std::vector<double>* sums :
       {&result.damped, &result.bound, &result.widest, &result.clipped_reach}) {
    sums->resize(static_cast<size_t>(rows));
  }
  result.clipped.resize(static_cast<size_t>(rows));
  const bool dynamic = rules.first_dynamic_group < grid.groups;

  constexpr int64_t kTileStrips = kTileRows / kStripRows;
  const int64_t tiles = (targets.strips() + kTileStrips - 1) / kTileStrips;
  std::mutex mutex;
  int64_t blocks_done = 0;

  context.executor->ParallelFor(tiles, [&](int64_t tile) {
    const int64_t first = tile * kTileStrips;
    const int64_t strips = std::min(kTileStrips, targets.strips() - first);
    std::vector<StripSweep> sweeps;
    sweeps.reserve(static_cast<size_t>(strips));
    for (int64_t s = first; s < first + strips; ++s) {
      sweeps.emplace_back(spec, rules, u, bound_d, grid, s * kStripRows, targets.strip(s));
    }
    for (int64_t b = 0; b < u.blocks(); ++b) {
      if (context.cancelled()) return;
      const int64_t begin = b * kPanelRows;
      const int64_t columns = std::min(kPanelRows, features - begin);
      for (StripSweep& sweep : sweeps) sweep.Begin(b);
      for (int64_t k0 = 0; k0 < begin; k0 += kDepth) {
        for (StripSweep& sweep : sweeps) sweep.Hear(b, k0, std::min(kDepth, begin - k0));
      }
      for (int64_t s = 0; s < strips; ++s) {
        StripSweep& sweep = sweeps[static_cast<size_t>(s)];
        sweep.Round(b);
        const int64_t row = (first + s) * kStripRows;
        for (int64_t c = 0; c < std::min(kStripRows, rows - row); ++c) {
          uint8_t* to = result.codes.data() + (row + c) * features + begin;
          for (int64_t j = 0; j < columns; ++j) to[j] = sweep.codes()[j * kStripRows + c];
        }
      }
      const std::lock_guard<std::mutex> lock(mutex);
      ++blocks_done;
      context.Report(Phase::kRound,
                     static_cast<double>(blocks_done) / static_cast<double>(tiles * u.blocks()));
    }

    double overshoot = 0;
    for (int64_t s = 0; s < strips; ++s) {
      const StripSweep& sweep = sweeps[static_cast<size_t>(s)];
      const int64_t row = (first + s) * kStripRows;
      const int64_t live = std::min(kStripRows, rows - row);
      Collect(sweep, row, live, dynamic, grid, result);
      for (int64_t c = 0; c < live; ++c) {
        overshoot = std::max(overshoot, static_cast<double>(sweep.sums().overshoot[c]));
      }
    }
    const std::lock_guard<std::mutex> lock(mutex);
    result.worst_overshoot = std::max(result.worst_overshoot, overshoot);
  });
  if (context.cancelled()) return context.CancellationStatus();
  return result;
}

}  // namespace certiq::engine
