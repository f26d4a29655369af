#include "engine/fold_block.h"

#include <algorithm>

#include "engine/aligned.h"
#include "engine/simd.h"

namespace certiq::engine {
namespace {

// Rows of a chain, and of the sums that are made of chains.
constexpr int64_t kSpans[] = {8, 32, 128};

// Sums of a micro tile, [kMicroRows][kStrip].
struct MicroSums {
  alignas(kVectorBytes) float value[kMicroRows * kStrip<float>] = {};

  void Add(const MicroSums& other) {
    for (int i = 0; i < kMicroRows * kStrip<float>; ++i) value[i] += other.value[i];
  }
};

// sums += sum over kSpans[1] rows of a_i b_j, in chains of kSpans[0], unrolled. A function of its
// own: with the sums of more spans around it GCC 12 runs out of registers and halves its speed.
__attribute__((noinline)) void AddSpan(const float* a, const float* b, MicroSums& sums) {
  Vector<float> span[kMicroRows][2];
  for (int64_t begin = 0; begin < kSpans[1]; begin += kSpans[0]) {
    Vector<float> chain[kMicroRows][2];
    const Vector<float> low = LoadVector(b + begin * kStrip<float>);
    const Vector<float> high = LoadVector(b + begin * kStrip<float> + kLanes<float>);
#pragma GCC unroll 8
    for (int r = 0; r < kMicroRows; ++r) {
      const float scalar = a[begin * kStrip<float> + r];
      chain[r][0] = scalar * low;
      chain[r][1] = scalar * high;
    }
#pragma GCC unroll 8
    for (int64_t k = begin + 1; k < begin + kSpans[0]; ++k) {
      const Vector<float> b0 = LoadVector(b + k * kStrip<float>);
      const Vector<float> b1 = LoadVector(b + k * kStrip<float> + kLanes<float>);
#pragma GCC unroll 8
      for (int r = 0; r < kMicroRows; ++r) {
        const float scalar = a[k * kStrip<float> + r];
        chain[r][0] += scalar * b0;
        chain[r][1] += scalar * b1;
      }
    }
    for (int r = 0; r < kMicroRows; ++r) {
      span[r][0] = begin == 0 ? chain[r][0] : span[r][0] + chain[r][0];
      span[r][1] = begin == 0 ? chain[r][1] : span[r][1] + chain[r][1];
    }
  }
  for (int64_t r = 0; r < kMicroRows; ++r) {
    float* to = sums.value + r * kStrip<float>;
    StoreVector(to, LoadVector(to) + span[r][0]);
    StoreVector(to + kLanes<float>, LoadVector(to + kLanes<float>) + span[r][1]);
  }
}

// The same for fewer than kSpans[1] rows.
void AddRest(int64_t rows, const float* a, const float* b, MicroSums& sums) {
  MicroSums span;
  for (int64_t k = 0; k < rows; k += kSpans[0]) {
    MicroSums chain;
    MultiplyIntoStrip(kMicroRows, std::min(kSpans[0], rows - k), a + k * kStrip<float>,
                      int64_t{kStrip<float>}, int64_t{1}, b + k * kStrip<float>, chain.value);
    span.Add(chain);
  }
  sums.Add(span);
}

// Sums over `rows` <= kFoldRows rows of a_i b_j; see StatisticsAccumulator. Beside each span one
// row of `out` is fetched, which is added to afterwards.
MicroSums SumRows(int64_t rows, const float* a, const float* b, const double* out,
                  int64_t out_stride, int64_t out_rows) {
  MicroSums sums;
  int64_t ahead = 0;
  for (int64_t top = 0; top < rows; top += kSpans[2]) {
    MicroSums part;
    for (int64_t k = top; k < std::min(rows, top + kSpans[2]); k += kSpans[1]) {
      if (ahead < out_rows) {
        for (int64_t c = 0; c < kStrip<float>; c += static_cast<int64_t>(kLineBytes / 8)) {
          __builtin_prefetch(out + ahead * out_stride + c, 1);
        }
        ++ahead;
      }
      if (k + kSpans[1] <= rows) {
        AddSpan(a + k * kStrip<float>, b + k * kStrip<float>, part);
      } else {
        AddRest(rows - k, a + k * kStrip<float>, b + k * kStrip<float>, part);
      }
    }
    sums.Add(part);
  }
  return sums;
}

}  // namespace

void FoldBlock(int64_t rows, const float* a, int64_t live_rows, const float* b, int64_t live_cols,
               const double* scale_a, const double* scale_b, double* out, int64_t out_stride) {
  const MicroSums sums = SumRows(rows, a, b, out, out_stride, live_rows);
  for (int64_t r = 0; r < live_rows; ++r) {
    double* row = out + r * out_stride;
    const float* from = sums.value + r * kStrip<float>;
    if (scale_a == nullptr && live_cols == kStrip<float>) {
      for (int c = 0; c < kStrip<float>; ++c) row[c] += static_cast<double>(from[c]);
      continue;
    }
    for (int64_t c = 0; c < live_cols; ++c) {
      const double factor = scale_a == nullptr ? 1.0 : scale_a[r] * scale_b[c];
      row[c] += factor * static_cast<double>(from[c]);
    }
  }
}

}  // namespace certiq::engine
