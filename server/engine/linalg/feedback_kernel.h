// Feedback kernel: sums of w_k U_kj over k for strips of rows w side by side.
// Included by .cc files of the engine only, like simd.h.

#ifndef CERTIQ_ENGINE_LINALG_FEEDBACK_KERNEL_H_
#define CERTIQ_ENGINE_LINALG_FEEDBACK_KERNEL_H_

#include <algorithm>
#include <cstdint>
#include <vector>

#include "engine/kernels/aligned.h"
#include "engine/kernels/simd.h"
#include "engine/kernels/upper_triangle.h"
#include "engine/linalg/feedback_columns.h"
#include "engine/run_context.h"

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

// v [kMicroRows][kStrip] += sum_{k0 <= k < k1} U_kj w_k for the columns j of group g of block b; w
// is [features][kStrip]. The rows lie in one slice. Not inlined: in a larger function GCC 12 does
// not keep the sums in registers.
__attribute__((noinline)) inline void AddFeedbackSlice(const FeedbackColumns& u, int64_t b,
                                                       int64_t g, int64_t k0, int64_t k1,
                                                       const float* w, float* v) {
  Accumulator<float> sum;
  LoadAccumulator(v, sum);
  MultiplyStrip(k1 - k0, FeedbackRow(u, b, g, k0), kMicroRows, 1, w + k0 * kStrip<float>, sum);
  StoreAccumulator(sum, v);
}

// The same for any rows.
inline void AddFeedbackGroup(const FeedbackColumns& u, int64_t b, int64_t g, int64_t k0, int64_t k1,
                             const float* w, float* v) {
  while (k0 < k1) {
    const int64_t stop = std::min(k1, (k0 / kSliceRows + 1) * kSliceRows);
    AddFeedbackSlice(u, b, g, k0, stop, w, v);
    k0 = stop;
  }
}

// The rows of a slice for all groups of the block; v is [kPanelRows][kStrip]. Beside each product
// what comes next is fetched, of U and of the rows that it is to meet.
inline void AddFeedbackBlock(const FeedbackColumns& u, int64_t b, int64_t k0, int64_t k1,
                             const float* w, Prefetcher& next_u, Prefetcher next_w, float* v) {
  for (int64_t g = 0; g < kGroups; ++g) {
    next_u.FetchPart();
    next_w.FetchPart();
    AddFeedbackSlice(u, b, g, k0, k1, w, v + g * kMicroRows * kStrip<float>);
  }
}

// Adds the feedback of what comes before block b to every strip of a tile, slice by slice, so that
// they share each slice of U. A Strip has AddFeedback(b, k0, k1, next_u, next_w) and row(k), row k
// of what U is multiplied with.
template <typename Strip>
void AddFeedbackBefore(const FeedbackColumns& u, int64_t b, std::vector<Strip>& strips) {
  constexpr int64_t kFloat = sizeof(float);
  const auto count = static_cast<int64_t>(strips.size());
  for (int64_t k0 = 0; k0 < b * kPanelRows; k0 += kSliceRows) {
    const int64_t k1 = std::min(k0 + kSliceRows, b * kPanelRows);
    // What follows a slice in memory follows it in time.
    Prefetcher next_u(u.block(b) + k1 * kPanelRows,
                      kSliceRows * kPanelRows * kFloat / (kGroups * count));
    for (int64_t s = 0; s < count; ++s) {
      const float* next =
          s + 1 < count ? strips[static_cast<size_t>(s + 1)].row(k0) : strips.front().row(k1);
      strips[static_cast<size_t>(s)].AddFeedback(
          b, k0, k1, next_u, Prefetcher(next, kSliceRows * kStrip<float> * kFloat / kGroups));
    }
  }
}

// A strip of rows x of X U = B, B given in place: x_j = b_j - sum_{k < j} x_k U_kj, the same
// products that the sweep makes. Blocks pass in order; of each: Begin, AddFeedback what is before
// it, slice by slice, Solve.
class RowsOverU {
 public:
  // `x` [features][kStrip] outlives the object. Nothing before row `first_row` differs from zero.
  RowsOverU(const FeedbackColumns& u, float* x, int64_t first_row)
      : u_(u),
        x_(x),
        first_row_(first_row / kMicroRows * kMicroRows),
        v_(static_cast<size_t>(kPanelRows * kStrip<float>)) {}

  void Begin() { std::fill(v_.begin(), v_.end(), 0.0f); }
  const float* row(int64_t k) const { return x_ + k * kStrip<float>; }
  void AddFeedback(int64_t b, int64_t k0, int64_t k1, Prefetcher& next_u, Prefetcher next_w) {
    k0 = std::max(k0, first_row_);
    if (k0 < k1) AddFeedbackBlock(u_, b, k0, k1, x_, next_u, next_w, v_.data());
  }
  // The columns of the block, from the feedback added.
  void Solve(int64_t b) {
    // Nothing before it in the block differs from zero.
    const int64_t begin = std::max(b * kPanelRows, first_row_);
    for (int64_t first = begin; first < u_.end(b); first += kMicroRows) {
      const int64_t g = (first - b * kPanelRows) / kMicroRows;
      float* v = v_.data() + g * kMicroRows * kStrip<float>;
      if (first > begin) AddFeedbackSlice(u_, b, g, begin, first, x_, v);
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
  int64_t first_row_;
  AlignedVector<float> v_;
};

// Solves all strips of a tile, which share each slice of U. False once cancelled.
inline bool SolveTile(const FeedbackColumns& u, std::vector<RowsOverU>& strips,
                      const RunContext& context) {
  for (int64_t b = 0; b < u.blocks(); ++b) {
    if (context.cancelled()) return false;
    for (RowsOverU& strip : strips) strip.Begin();
    AddFeedbackBefore(u, b, strips);
    for (RowsOverU& strip : strips) strip.Solve(b);
  }
  return true;
}

}  // namespace certiq::engine

#endif  // CERTIQ_ENGINE_LINALG_FEEDBACK_KERNEL_H_
