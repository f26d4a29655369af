// The kernel of the sums: products of two strips of columns over a block of rows.
// Included by .cc files of the engine only, like simd.h.

#ifndef CERTIQ_ENGINE_FOLD_BLOCK_H_
#define CERTIQ_ENGINE_FOLD_BLOCK_H_

#include <cstdint>

namespace certiq::engine {

// Rows whose products are summed in float32 before they are added to float64; see
// StatisticsAccumulator.
inline constexpr int64_t kFoldRows = 256;

// out[i][j] += sum over `rows` <= kFoldRows rows of a_i b_j for one strip of columns j,
// kMicroRows columns i. Scales are null or per column.
void FoldBlock(int64_t rows, const float* a, int64_t live_rows, const float* b, int64_t live_cols,
               const double* scale_a, const double* scale_b, double* out, int64_t out_stride);

}  // namespace certiq::engine

#endif  // CERTIQ_ENGINE_FOLD_BLOCK_H_
