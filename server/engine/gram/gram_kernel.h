// Gram kernel: products of two strips of columns over a block of rows.
// Included by .cc files of the engine only, like simd.h.

#ifndef CERTIQ_ENGINE_GRAM_GRAM_KERNEL_H_
#define CERTIQ_ENGINE_GRAM_GRAM_KERNEL_H_

#include <cstdint>

namespace certiq::engine {

// Products are summed in float32 over chains of kChainRows rows, kFoldChains of these in a binary
// tree, and then added to float64; see StatisticsAccumulator.
inline constexpr int64_t kChainRows = 12;
inline constexpr int64_t kFoldChains = 16;
inline constexpr int64_t kFoldRows = kChainRows * kFoldChains;

// out[i][j] += sum over `rows` <= kFoldRows rows of a_i b_j for one strip of columns j,
// kMicroRows columns i. Scales are null or per column.
void AddGramBlock(int64_t rows, const float* a, int64_t live_rows, const float* b,
                  int64_t live_cols, const double* scale_a, const double* scale_b, double* out,
                  int64_t out_stride);

}  // namespace certiq::engine

#endif  // CERTIQ_ENGINE_GRAM_GRAM_KERNEL_H_
