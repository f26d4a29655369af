// Streaming sums of calibration activations.

#ifndef CERTIQ_ENGINE_STATISTICS_H_
#define CERTIQ_ENGINE_STATISTICS_H_

#include <cstddef>
#include <cstdint>
#include <memory>
#include <optional>
#include <vector>

#include "absl/status/status.h"
#include "engine/dtype.h"
#include "engine/run_context.h"
#include "engine/upper_panels.h"

namespace certiq::engine {

// What mismatched inputs add: P = X - X~, the part of a layer's inputs that earlier quantization
// changed. Sums of P keep the digits that differences of sums would lose; the
// customary ones follow: X~^T X = cross^T + X~^T X~, X^T X = residual + cross + cross^T + X~^T X~.
struct MismatchSums {
  // P^T P [N, N], upper triangle.
  UpperPanels<double> residual;
  // P^T X~ [N, N], row-major: rows belong to P, columns to X~.
  std::vector<double> cross;
};

// Sums over tokens, float64. They merge by addition.
struct Statistics {
  // Tokens (rows) summed.
  int64_t tokens = 0;
  // X~^T X~ [N, N], upper triangle; X^T X where inputs are matched.
  UpperPanels<double> gram;
  // Set where X~ differs from X.
  std::optional<MismatchSums> mismatch;

  int64_t features() const { return gram.size(); }
};

// Sums that several layers may use at once.
using SharedStatistics = std::shared_ptr<const Statistics>;

// Adds `other` to `sums`. REQUIRES: the same features, both matched or both mismatched.
void Merge(const Statistics& other, Statistics& sums);

// Features in another order: feature i of the result is feature order[i].
Statistics Permute(const Statistics& statistics, const std::vector<int64_t>& order);

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

  // REQUIRES: features >= 1. `mismatched`: rows come in pairs of X and X~.
  explicit StatisticsAccumulator(int64_t features, bool mismatched = false);
  // Goes on from sums made before. REQUIRES: at least one feature.
  explicit StatisticsAccumulator(Statistics sums);

  // Bytes that an accumulator and its sums hold.
  static int64_t BytesFor(int64_t features, bool mismatched = false);

  // Adds `rows` rows of `features` elements of X (= X~). A value that is not finite (or
  // beyond float32) is refused with INVALID_ARGUMENT naming `field`, its row (`first_row` is that
  // of the first, as the sender counts) and column; the sums are then unusable. REQUIRES: not
  // mismatched.
  absl::Status Append(DType dtype, const std::byte* bytes, int64_t first_row, int64_t rows,
                      const char* field, Executor& executor);

  // The same rows of X and of X~. REQUIRES: mismatched.
  absl::Status AppendPair(DType x_dtype, const std::byte* x, DType x_quantized_dtype,
                          const std::byte* x_quantized, int64_t first_row, int64_t rows,
                          const char* x_field, const char* x_quantized_field, Executor& executor);

  // Whether Append, or AppendPair, would take these rows; nothing changes. For those who
  // must take a piece whole or not at all.
  absl::Status Check(DType dtype, const std::byte* bytes, int64_t first_row, int64_t rows,
                     const char* field);
  absl::Status CheckPair(DType x_dtype, const std::byte* x, DType x_quantized_dtype,
                         const std::byte* x_quantized, int64_t first_row, int64_t rows,
                         const char* x_field, const char* x_quantized_field);

  // Adds ready-made sums. REQUIRES: of the same kind.
  void Add(const Statistics& sums) { Merge(sums, statistics_); }

  int64_t tokens() const { return statistics_.tokens; }

  // Folds what is still staged; the sums of all rows so far, valid until the next call.
  const Statistics& Flush(Executor& executor);

  // Folds what is still staged and returns the sums; the accumulator is spent.
  Statistics Finish(Executor& executor) &&;

 private:
  // Rows waiting to be folded: strips of kStrip columns, each [kBlockRows][kStrip].
  struct Staged {
    std::vector<float> values;
    // Per column, what staged values were divided by.
    std::vector<double> scale;
    bool scaled = false;
  };

  void Allocate();
  // Decode row r of the piece, to row_ and, in pairs, X - X~ to x_row_; check it.
  absl::Status DecodeRow(DType dtype, const std::byte* bytes, int64_t first_row, int64_t r,
                         const char* field);
  absl::Status DecodeRowPair(DType x_dtype, const std::byte* x, DType x_quantized_dtype,
                             const std::byte* x_quantized, int64_t first_row, int64_t r,
                             const char* x_field, const char* x_quantized_field);
  void Stage(const float* row, Staged& to) const;
  void ScaleColumns(Staged& staged) const;
  void Fold(Executor& executor);
  // out += a^T b over the staged rows; out is laid out like `layout`'s panels
  // where `upper`, else a row-major square.
  void FoldInto(const Staged& a, const Staged& b, bool upper, double* out,
                const UpperPanels<double>& layout, Executor& executor) const;

  int64_t features_;
  Statistics statistics_;
  // X~ (or X), and P = X - X~ where mismatched.
  Staged inputs_;
  Staged residual_;
  int64_t staged_rows_ = 0;
  std::vector<float> row_;
  std::vector<float> x_row_;
};

}  // namespace certiq::engine

#endif  // CERTIQ_ENGINE_STATISTICS_H_
