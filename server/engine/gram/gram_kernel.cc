#include "engine/gram/gram_kernel.h"

#include <algorithm>
#include <bit>

#include "engine/kernels/aligned.h"
#include "engine/kernels/simd.h"

namespace certiq::engine {
namespace {

// Sums of a micro tile, [kMicroRows][kStrip].
struct MicroSums {
  alignas(kVectorBytes) float value[kMicroRows * kStrip<float>];
};

// Sums that wait for another of their kind: level l those over 2^l chains.
constexpr int64_t kLevels = std::bit_width(static_cast<uint64_t>(kFoldChains));
static_assert(std::has_single_bit(static_cast<uint64_t>(kFoldChains)));
using LevelSums = MicroSums[kLevels];

// sum + the levels below `level`, to that level. With AVX-512 adds take the place of multiply-adds
// on some CPUs; loads and stores do not.
__attribute__((always_inline)) inline void Carry(Accumulator<float>& sum, int64_t level,
                                                 LevelSums& levels) {
  for (int64_t below = 0; below < level; ++below) {
    const float* from = levels[below].value;
#pragma GCC unroll 8
    for (int64_t r = 0; r < kMicroRows; ++r) {
      sum.row[r][0] += LoadVector(from + r * kStrip<float>);
      sum.row[r][1] += LoadVector(from + r * kStrip<float> + kLanes<float>);
    }
  }
  StoreAccumulator(sum, levels[level].value);
}

// A chain over kChainRows rows of a_i b_j, unrolled, and the sums it completes.
__attribute__((noinline)) void AddChain(const float* a, const float* b, int64_t level,
                                        LevelSums& levels) {
  Accumulator<float> chain;
  const Vector<float> low = LoadVector(b);
  const Vector<float> high = LoadVector(b + kLanes<float>);
#pragma GCC unroll 8
  for (int r = 0; r < kMicroRows; ++r) {
    chain.row[r][0] = a[r] * low;
    chain.row[r][1] = a[r] * high;
  }
#pragma GCC unroll 16
  for (int64_t k = 1; k < kChainRows; ++k) {
    const Vector<float> b0 = LoadVector(b + k * kStrip<float>);
    const Vector<float> b1 = LoadVector(b + k * kStrip<float> + kLanes<float>);
#pragma GCC unroll 8
    for (int r = 0; r < kMicroRows; ++r) {
      const float scalar = a[k * kStrip<float> + r];
      chain.row[r][0] += scalar * b0;
      chain.row[r][1] += scalar * b1;
    }
  }
  Carry(chain, level, levels);
}

// The same for a chain of fewer rows, none included.
__attribute__((noinline)) void AddRest(int64_t rows, const float* a, const float* b, int64_t level,
                                       LevelSums& levels) {
  Accumulator<float> chain;
  ClearAccumulator(chain);
  MultiplyStrip(rows, a, int64_t{kStrip<float>}, int64_t{1}, b, chain);
  Carry(chain, level, levels);
}

// Sums over `rows` <= kFoldRows rows of a_i b_j, a binary tree of chains. Beside some of them a row
// of `out` is fetched, which is added to afterwards.
const MicroSums& SumRows(int64_t rows, const float* a, const float* b, const double* out,
                         int64_t out_stride, int64_t out_rows, LevelSums& levels) {
  for (int64_t chain = 0; chain < kFoldChains; ++chain) {
    if (chain % 2 == 0 && chain / 2 < out_rows) {
      for (int64_t c = 0; c < kStrip<float>; c += static_cast<int64_t>(kLineBytes / 8)) {
        __builtin_prefetch(out + chain / 2 * out_stride + c, 1);
      }
    }
    const int64_t level = std::countr_one(static_cast<uint64_t>(chain));
    const int64_t k = chain * kChainRows;
    const float* left = a + k * kStrip<float>;
    const float* right = b + k * kStrip<float>;
    if (k + kChainRows <= rows) {
      AddChain(left, right, level, levels);
    } else {
      AddRest(std::max<int64_t>(0, rows - k), left, right, level, levels);
    }
  }
  return levels[kLevels - 1];
}

}  // namespace

void AddGramBlock(int64_t rows, const float* a, int64_t live_rows, const float* b,
                  int64_t live_cols, const double* scale_a, const double* scale_b, double* out,
                  int64_t out_stride) {
  LevelSums levels;
  const MicroSums& sums = SumRows(rows, a, b, out, out_stride, live_rows, levels);
  for (int64_t r = 0; r < live_rows; ++r) {
    double* row = out + r * out_stride;
    const float* sum = sums.value + r * kStrip<float>;
    if (scale_a == nullptr && live_cols == kStrip<float>) {
      for (int c = 0; c < kStrip<float>; ++c) row[c] += static_cast<double>(sum[c]);
      continue;
    }
    for (int64_t c = 0; c < live_cols; ++c) {
      const double factor = scale_a == nullptr ? 1.0 : scale_a[r] * scale_b[c];
      row[c] += factor * static_cast<double>(sum[c]);
    }
  }
}

}  // namespace certiq::engine
