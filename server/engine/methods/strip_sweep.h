// Feedback sweep over one strip of rows.
// Included by .cc files of the engine only, like simd.h.

#ifndef CERTIQ_ENGINE_METHODS_STRIP_SWEEP_H_
#define CERTIQ_ENGINE_METHODS_STRIP_SWEEP_H_

#include <algorithm>
#include <cstdint>
#include <vector>

#include "engine/kernels/simd.h"
#include "engine/linalg/feedback_kernel.h"
#include "engine/methods/feedback_sweep.h"
#include "engine/methods/round_column.h"
#include "engine/scales/diagonal_scale_search.h"
#include "engine/scales/piso_layer.h"

namespace certiq::engine {

// The sweep over one strip of rows. `w` is the strip of weights, which turns
// into weights minus levels from the left; `v` [kPanelRows][kStripRows] is
// the block being rounded, weights and offsets plus the feedback added so far.
class StripSweep {
 public:
  StripSweep(const ResolvedSpec& spec, const SweepRules& rules, const FeedbackColumns& u,
             const std::vector<double>& d, const DiagonalMetric& metric, const Grid& grid,
             int64_t first_row, float multiplier, float* w)
      : spec_(spec),
        rules_(rules),
        u_(u),
        d_(d),
        metric_(metric),
        search_(spec),
        piso_(spec),
        group_of_(grid.group_of),
        first_row_(first_row),
        multiplier_(multiplier),
        steps_(grid, first_row),
        w_(w),
        offsets_(rules.offsets == nullptr ? nullptr : rules.offsets->strip(first_row / kStripRows)),
        v_(static_cast<size_t>(kPanelRows * kStripRows)),
        codes_(static_cast<size_t>(kPanelRows * kStripRows)) {
    if (multiplier == 1) return;
    for (int64_t r = first_row; r < std::min(first_row + kStripRows, grid.rows); ++r) {
      for (int64_t g = 0; g < grid.groups; ++g) {
        const auto at = static_cast<size_t>(r * grid.groups + g);
        steps_.Set(g, r - first_row, StretchedQuantParams(spec, grid.Params(at), multiplier));
      }
    }
  }

  // Loads what block b starts from.
  void Begin(int64_t b) {
    begin_ = b * kPanelRows;
    const int64_t values = std::min(kPanelRows, u_.features() - begin_) * kStripRows;
    std::copy_n(w_ + begin_ * kStripRows, values, v_.data());
    if (offsets_ == nullptr) return;
    const float* offsets = offsets_ + begin_ * kStripRows;
    for (int64_t i = 0; i < values; ++i) v_[static_cast<size_t>(i)] += offsets[i];
  }

  // Adds the feedback of columns [k0, k1), all before the block, to the whole block.
  void AddFeedback(int64_t b, int64_t k0, int64_t k1, Prefetcher& next_u, Prefetcher next_w) {
    AddFeedbackBlock(u_, b, k0, k1, w_, next_u, next_w, v_.data());
  }
  const float* row(int64_t k) const { return w_ + k * kStripRows; }

  // Adds the feedback of the block's columns before micro-group g to that group.
  void AddFeedbackWithin(int64_t b, int64_t g) {
    const int64_t first = g * kMicroRows;
    if (g > 0)
      AddFeedbackSlice(u_, b, g, begin_, begin_ + first, w_, v_.data() + first * kStripRows);
  }

  // Rounds column j of block b and adds its feedback to the rest of its micro-group.
  void RoundColumn(int64_t b, int64_t j) {
    if (StartsDynamicGroup(begin_ + j)) FitGroup(j);
    float* v = v_.data() + j * kStripRows;
    const int64_t column = begin_ + j;
    const int64_t group = group_of_[static_cast<size_t>(column)];
    alignas(kVectorBytes) float code[kStripRows];
    alignas(kVectorBytes) float level[kStripRows];
    if (rules_.codes != nullptr) {
      LoadCodes(*rules_.codes, u_.features(), first_row_, column, steps_, code);
    } else if (spec_.rounding == Rounding::kNearest) {
      NearestCodes(steps_, group, v, code);
    } else {
      const int64_t original = rules_.order == nullptr || rules_.order->empty()
                                   ? column
                                   : (*rules_.order)[static_cast<size_t>(column)];
      StochasticCodes(steps_, group, v, spec_.seed, first_row_, original, code);
    }
    AddRounded(steps_, group, spec_.rounding, d_[static_cast<size_t>(column)], v, code, level,
               sums_);
    float* change = w_ + column * kStripRows;
    for (int64_t c = 0; c < kStripRows; ++c) change[c] -= level[c];
    const int64_t g = j / kMicroRows;
    const float* feedback = FeedbackRow(u_, b, g, column);
    for (int64_t k = j + 1; k < (g + 1) * kMicroRows; ++k) {
      float* later = v_.data() + k * kStripRows;
      const float scalar = feedback[k - g * kMicroRows];
      for (int64_t c = 0; c < kStripRows; ++c) later[c] += scalar * change[c];
    }
    uint8_t* codes = codes_.data() + j * kStripRows;
    for (int64_t c = 0; c < kStripRows; ++c) {
      codes[c] = static_cast<uint8_t>(static_cast<int32_t>(code[c]));
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

  // P of (S5), o_j + sum_{k < start} (w_k - q_k) U_kj, for the columns j of group g of `block`,
  // which is the one at hand or a later one.
  void FeedbackBefore(int64_t start, int64_t block, int64_t g, float* p) const {
    const int64_t first = block * kPanelRows + g * kMicroRows;
    if (block * kPanelRows != begin_) {
      for (int64_t i = 0; i < kMicroRows * kStripRows; ++i) {
        const bool there = offsets_ != nullptr && first + i / kStripRows < u_.features();
        p[i] = there ? offsets_[first * kStripRows + i] : 0.0f;
      }
      AddFeedbackGroup(u_, block, g, 0, start, w_, p);
      return;
    }
    // The feedback of what is before the block is in v_ already.
    const float* v = v_.data() + (first - begin_) * kStripRows;
    for (int64_t i = 0; i < kMicroRows * kStripRows; ++i) {
      p[i] = first + i / kStripRows < u_.features() ? v[i] - w_[first * kStripRows + i] : 0.0f;
    }
    // Its own group got its feedback column by column.
    if (first > start) AddFeedbackGroup(u_, block, g, begin_, start, w_, p);
  }

  // Scale and zero point of a group by the spec's rule, from its updated weights.
  QuantParams FittedQuantParams(int32_t group, int64_t start, const std::vector<float>& updated) {
    const auto count = static_cast<int64_t>(updated.size());
    if (!HasMetric(spec_.scale)) return FitQuantParams(spec_, updated.data(), count);
    const QuantParams params = search_.Find(updated.data(), count, metric_, start);
    if (rules_.metric->full == nullptr) return params;
    std::vector<double> wide(updated.begin(), updated.end());
    return PisoQuantParams(piso_, *rules_.metric->full, group, count, wide.data(), params);
  }

  // The scale and zero point of the group that starts at column s0 of the block, from the
  // updated weights v* = w + P U_gg^-1.
  void FitGroup(int64_t s0) {
    const int64_t start = begin_ + s0;
    const int32_t group = group_of_[static_cast<size_t>(start)];
    int64_t end = start;
    while (end < u_.features() && group_of_[static_cast<size_t>(end)] == group) ++end;
    std::vector<float> moved(static_cast<size_t>((end - start) * kStripRows));
    alignas(kVectorBytes) float p[kMicroRows * kStripRows];
    for (int64_t at = start; at < end;) {
      const int64_t block = at / kPanelRows;
      const int64_t g = at % kPanelRows / kMicroRows;
      const int64_t first = block * kPanelRows + g * kMicroRows;
      const int64_t stop = std::min(end, first + kMicroRows);
      FeedbackBefore(start, block, g, p);
      std::copy(p + (at - first) * kStripRows, p + (stop - first) * kStripRows,
                moved.data() + (at - start) * kStripRows);
      at = stop;
    }
    // x U_gg = P from the left, in place.
    for (int64_t j = 1; j < end - start; ++j) {
      const int64_t block = (start + j) / kPanelRows;
      const int64_t lane = (start + j) % kMicroRows;
      const int64_t g = (start + j) % kPanelRows / kMicroRows;
      float* x = moved.data() + j * kStripRows;
      for (int64_t k = 0; k < j; ++k) {
        const float feedback = FeedbackRow(u_, block, g, start + k)[lane];
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
      steps_.Set(
          group, c,
          StretchedQuantParams(spec_, FittedQuantParams(group, start, updated), multiplier_));
    }
  }

  const ResolvedSpec& spec_;
  const SweepRules& rules_;
  const FeedbackColumns& u_;
  const std::vector<double>& d_;
  const DiagonalMetric& metric_;
  DiagonalScaleSearch search_;
  PisoRowSearch piso_;
  const std::vector<int32_t>& group_of_;
  int64_t first_row_;
  float multiplier_;
  StripGrid steps_;
  float* w_;
  // Null: none.
  const float* offsets_;
  AlignedVector<float> v_;
  AlignedVector<uint8_t> codes_;
  StripSums sums_;
  int64_t begin_ = 0;
};

}  // namespace certiq::engine

#endif  // CERTIQ_ENGINE_METHODS_STRIP_SWEEP_H_
