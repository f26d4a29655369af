// Streaming sums of calibration activations.

#ifndef CERTIQ_ENGINE_STATISTICS_H_
#define CERTIQ_ENGINE_STATISTICS_H_

#include <cstddef>
#include <cstdint>
#include <vector>

#include "absl/status/status.h"
#include "engine/dtype.h"
#include "engine/run_context.h"
#include "engine/upper_panels.h"

namespace certiq::engine {

// Sums over tokens. They merge by addition.
struct Statistics {
  // Tokens (rows of X) summed.
  int64_t tokens = 0;
  // X^T X [N, N], float64, upper triangle.
  UpperPanels<double> gram;

  int64_t features() const { return gram.size(); }
};

// Folds rows of X [m, N] into Statistics as they arrive.
//
// Rows are staged in blocks of kBlockRows whatever the size of the pieces
// they come in, so the result depends on the rows and their order alone, not
// on chunks or threads. Products are float32 in chains of kChainRows, sums float64: with
// u = 2^-24, an entry is off by at most (kChainRows - 1) u sqrt(H_ii H_jj) < 9e-7 sqrt(H_ii H_jj)
// however many rows stream in, plus the rounding of F64/I64/I32 inputs to
// float32. Columns whose squares would leave the range of float32 are scaled
// by powers of two, which is exact.
//
// Not thread-safe.
class StatisticsAccumulator {
 public:
  static constexpr int64_t kBlockRows = 256;
  static constexpr int64_t kChainRows = 16;

  // REQUIRES: features >= 1.
  explicit StatisticsAccumulator(int64_t features);

  // Bytes that an accumulator and its sums hold.
  static int64_t BytesFor(int64_t features);

  // Adds `rows` rows of `features` elements. A value that is not finite (or
  // beyond float32) is refused with INVALID_ARGUMENT naming `field`, its row
  // (counting all rows seen) and column; the sums are then unusable.
  absl::Status Append(DType dtype, const std::byte* bytes, int64_t rows, const char* field,
                      Executor& executor);

  int64_t tokens() const { return statistics_.tokens; }

  // Folds what is still staged and returns the sums; the accumulator is spent.
  Statistics Finish(Executor& executor) &&;

 private:
  void Stage(const float* row);
  void Fold(Executor& executor);
  // Brings columns with extreme magnitudes into range; true if any scale is not 1.
  bool ScaleColumns();

  int64_t features_;
  Statistics statistics_;
  // Strips of kStrip columns, each [kBlockRows][kStrip].
  std::vector<float> staged_;
  int64_t staged_rows_ = 0;
  std::vector<float> row_;
  // Per column, what staged values were divided by.
  std::vector<double> scale_;
};

}  // namespace certiq::engine

#endif  // CERTIQ_ENGINE_STATISTICS_H_
