// Products with U: sum_k w_k U_kj for strips of rows w side by side.
// Included by .cc files of the engine only, like simd.h.

#ifndef CERTIQ_ENGINE_FEEDBACK_KERNEL_H_
#define CERTIQ_ENGINE_FEEDBACK_KERNEL_H_

#include <algorithm>
#include <cstdint>
#include <vector>

#include "engine/aligned.h"
#include "engine/feedback_columns.h"
#include "engine/run_context.h"
#include "engine/simd.h"
#include "engine/upper_panels.h"

namespace certiq::engine {

// A block of FeedbackColumns is cut into slices of kSliceRows rows k, one after another; a slice
// into groups of kMicroRows columns, each [rows of the slice][kMicroRows]: what one kernel reads
// is contiguous. A slice, 64 KiB, stays in a second-level cache while the strips of a tile
// pass; the rows of a strip that it meets and the block of sums (16 KiB each with AVX-512) stay in
// the first level meanwhile. Twice the rows pass 48 KiB there, and were measured 8 % slower.
inline constexpr int64_t kSliceRows = 128;
inline constexpr int64_t kGroups = kPanelRows / kMicroRows;
static_assert(kSliceRows % kMicroRows == 0 && kPanelRows % kMicroRows == 0);
// A block's own rows are one slice.
static_assert(kSliceRows == kPanelRows);

// Offset in a block of `end` rows of element (k, g kMicroRows); those of the next k follow at
// kMicroRows while the slice lasts.
inline int64_t FeedbackOffset(int64_t end, int64_t g, int64_t k) {
  const int64_t slice = k / kSliceRows * kSliceRows;
  return slice * kPanelRows + (g * std::min(kSliceRows, end - slice) + k - slice) * kMicroRows;
}

// U_k,j for the columns j of group g of block b.
inline const float* FeedbackRow(const FeedbackColumns& u, int64_t b, int64_t g, int64_t k) {
  return u.block(b) + FeedbackOffset(u.end(b), g, k);
}

inline void LoadAccumulator(const float* from, Accumulator<float>& sum) {
  for (int64_t r = 0; r < kMicroRows; ++r) {
    sum.row[r][0] = LoadVector(from + r * kStrip<float>);
    sum.row[r][1] = LoadVector(from + r * kStrip<float> + kLanes<float>);
  }
}

inline void StoreAccumulator(const Accumulator<float>& sum, float* to) {
  for (int64_t r = 0; r < kMicroRows; ++r) {
    StoreVector(to + r * kStrip<float>, sum.row[r][0]);
    StoreVector(to + r * kStrip<float> + kLanes<float>, sum.row[r][1]);
  }
}

// v [kMicroRows][kStrip] += sum_{k0 <= k < k1} U_kj w_k for the columns j of group g of block b; w
// is [features][kStrip]. The rows lie in one slice.
inline void HearSlice(const FeedbackColumns& u, int64_t b, int64_t g, int64_t k0, int64_t k1,
                      const float* w, float* v) {
  Accumulator<float> sum;
  LoadAccumulator(v, sum);
  MultiplyStrip(k1 - k0, FeedbackRow(u, b, g, k0), kMicroRows, 1, w + k0 * kStrip<float>, sum);
  StoreAccumulator(sum, v);
}

// The same for any rows.
inline void HearGroup(const FeedbackColumns& u, int64_t b, int64_t g, int64_t k0, int64_t k1,
                      const float* w, float* v) {
  while (k0 < k1) {
    const int64_t stop = std::min(k1, (k0 / kSliceRows + 1) * kSliceRows);
    HearSlice(u, b, g, k0, stop, w, v);
    k0 = stop;
  }
}

// The rows of a slice for all groups of the block; v is [kPanelRows][kStrip].
inline void HearBlock(const FeedbackColumns& u, int64_t b, int64_t k0, int64_t k1, const float* w,
                      float* v) {
  for (int64_t g = 0; g < kGroups; ++g) {
    HearSlice(u, b, g, k0, k1, w, v + g * kMicroRows * kStrip<float>);
  }
}

// A strip of rows x of X U = B, B given in place: x_j = b_j - sum_{k < j} x_k U_kj, the same
// products that the sweep makes. Blocks pass in order; of each: Begin, Hear what is before it,
// slice by slice, Solve.
class RowsOverU {
 public:
  // `x` [features][kStrip] outlives the object. Nothing before `first_block` differs from zero.
  RowsOverU(const FeedbackColumns& u, float* x, int64_t first_block)
      : u_(u),
        x_(x),
        first_block_(first_block),
        v_(static_cast<size_t>(kPanelRows * kStrip<float>)) {}

  int64_t first_block() const { return first_block_; }
  void Begin() { std::fill(v_.begin(), v_.end(), 0.0f); }
  void Hear(int64_t b, int64_t k0, int64_t k1) {
    k0 = std::max(k0, first_block_ * kPanelRows);
    if (k0 < k1) HearBlock(u_, b, k0, k1, x_, v_.data());
  }
  // The columns of the block, from what they heard.
  void Solve(int64_t b) {
    if (b < first_block_) return;
    const int64_t begin = b * kPanelRows;
    for (int64_t g = 0; begin + g * kMicroRows < u_.end(b); ++g) {
      const int64_t first = begin + g * kMicroRows;
      float* v = v_.data() + g * kMicroRows * kStrip<float>;
      if (g > 0) HearSlice(u_, b, g, begin, first, x_, v);
      for (int64_t i = 0; i < std::min<int64_t>(kMicroRows, u_.end(b) - first); ++i) {
        float* x = x_ + (first + i) * kStrip<float>;
        for (int64_t c = 0; c < kStrip<float>; ++c) x[c] -= v[i * kStrip<float> + c];
        const float* feedback = FeedbackRow(u_, b, g, first + i);
        for (int64_t k = i + 1; k < kMicroRows; ++k) {
          for (int64_t c = 0; c < kStrip<float>; ++c) {
            v[k * kStrip<float> + c] += feedback[k] * x[c];
          }
        }
      }
    }
  }

 private:
  const FeedbackColumns& u_;
  float* x_;
  int64_t first_block_;
  AlignedVector<float> v_;
};

// Solves all strips of a tile, which share each slice of U. False once cancelled.
inline bool SolveTile(const FeedbackColumns& u, std::vector<RowsOverU>& strips,
                      const RunContext& context) {
  for (int64_t b = 0; b < u.blocks(); ++b) {
    if (context.cancelled()) return false;
    for (RowsOverU& strip : strips) strip.Begin();
    for (int64_t k0 = 0; k0 < b * kPanelRows; k0 += kSliceRows) {
      const int64_t k1 = std::min(k0 + kSliceRows, b * kPanelRows);
      for (RowsOverU& strip : strips) strip.Hear(b, k0, k1);
    }
    for (RowsOverU& strip : strips) strip.Solve(b);
  }
  return true;
}

}  // namespace certiq::engine

#endif  // CERTIQ_ENGINE_FEEDBACK_KERNEL_H_
