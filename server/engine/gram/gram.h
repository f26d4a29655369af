// Gram sums of calibration activations, accumulated as tokens stream in.

#ifndef CERTIQ_ENGINE_GRAM_GRAM_H_
#define CERTIQ_ENGINE_GRAM_GRAM_H_

#include <cstddef>
#include <cstdint>
#include <memory>
#include <optional>
#include <vector>

#include "absl/status/status.h"
#include "engine/kernels/aligned.h"
#include "engine/kernels/dtype.h"
#include "engine/kernels/upper_triangle.h"
#include "engine/run_context.h"

namespace certiq::engine {

// What mismatched inputs add: P = X - X~, the part of a layer's inputs that earlier quantization
// changed. Sums of P keep the digits that differences of sums would lose; the
// customary ones follow: X~^T X = cross^T + X~^T X~, X^T X = residual + cross + cross^T + X~^T X~.
struct MismatchSums {
  // P^T P [N, N], upper triangle.
  UpperTriangle<double> residual;
  // P^T X~ [N, N], row-major: rows belong to P, columns to X~.
  std::vector<double> cross;
  // As Statistics::massive_squares, of P.
  std::vector<double> massive_squares;
};

// Sums over tokens, float64. They merge by addition.
struct Statistics {
  // Tokens (rows) summed.
  int64_t tokens = 0;
  // X~^T X~ [N, N], upper triangle; X^T X where inputs are matched.
  UpperTriangle<double> gram;
  // Set where X~ differs from X.
  std::optional<MismatchSums> mismatch;
  // For every feature the share of massive tokens in the diagonal of `gram`, sum x~_tj^2 over them:
  // their products were taken in float64 (StatisticsAccumulator), those of the others in float32.
  // Empty: there were none.
  std::vector<double> massive_squares;

  int64_t features() const { return gram.size(); }
};

// Sums that several layers may use at once.
using SharedStatistics = std::shared_ptr<const Statistics>;

// Adds `other` to `sums`. REQUIRES: the same features, both matched or both mismatched.
void Merge(const Statistics& other, Statistics& sums);

// a + b, both as they were; the same REQUIRES.
Statistics Sum(const Statistics& a, const Statistics& b, Executor& executor);

// Features in another order: feature i of the result is feature order[i].
Statistics Permute(const Statistics& statistics, const std::vector<int64_t>& order,
                   Executor& executor);

// Rows of tokens as they come: X, or X~ with X beside it.
struct TokenRows {
  DType dtype = DType::kF32;
  // `rows` rows of N elements, no padding.
  const std::byte* bytes = nullptr;
  // Named in errors.
  const char* field = "";
};

// Folds rows of X [m, N] into Statistics as they arrive.
//
// Rows are staged in blocks of kBlockRows whatever the size of the pieces
// they come in, so the result depends on the rows and their order alone, not
// on chunks or threads. Products are float32, summed in chains of 12 rows, 16 chains in a binary
// tree, from there on in float64: with u = 2^-24, an entry is off by at most
// (12 + 4) u sum |x_i x_j| < 9.6e-7 sqrt(H_ii H_jj) however many rows stream in, plus the rounding
// of F64/I64/I32 inputs to float32. Columns whose squares would leave the range of float32 are
// scaled by powers of two, which is exact.
//
// Massive tokens, with an element kMassive times as large as the largest of an ordinary row, would
// leave nothing of the others in such sums where the weights' change is orthogonal to them, as
// error feedback makes it. Their products are exact, and summed in float64. So are those of all
// rows of a block that is too short to tell what is ordinary; of these the massive ones are told
// by the block before.
//
// Not thread-safe.
class StatisticsAccumulator {
 public:
  // A fold reads and writes all sums. At 0.5 TF/s (two threads with AVX-512) 192 rows a fold would
  // ask for 20 GB/s of memory, these for a fifth of that. Five times kFoldRows.
  static constexpr int64_t kBlockRows = 960;
  // How far the largest element of a massive token is above the median row's of its block.
  static constexpr float kMassive = 64;

  // REQUIRES: features >= 1. `mismatched`: rows come in pairs of X and X~.
  explicit StatisticsAccumulator(int64_t features, bool mismatched = false);
  // Goes on from sums made before. REQUIRES: at least one feature.
  explicit StatisticsAccumulator(Statistics sums);

  // Bytes that an accumulator and its sums hold.
  static int64_t BytesFor(int64_t features, bool mismatched = false);

  // Adds `rows` rows of X (= X~). A value that is not finite (or beyond float32) is refused with
  // INVALID_ARGUMENT naming the field, its row (`first_row` is that of the first, as the sender
  // counts) and column; the sums are then unusable. REQUIRES: not mismatched.
  absl::Status Append(const TokenRows& x, int64_t first_row, int64_t rows, Executor& executor);

  // The same rows of X and of X~. REQUIRES: mismatched.
  absl::Status AppendPair(const TokenRows& x, const TokenRows& x_quantized, int64_t first_row,
                          int64_t rows, Executor& executor);

  // Whether Append, or AppendPair, would take these rows of `features` elements. For those who
  // must take a piece whole or not at all.
  static absl::Status Check(const TokenRows& x, int64_t features, int64_t first_row, int64_t rows);
  static absl::Status CheckPair(const TokenRows& x, const TokenRows& x_quantized, int64_t features,
                                int64_t first_row, int64_t rows);

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
    AlignedVector<float> values;
    // Per column, what staged values were divided by.
    std::vector<double> scale;
    bool scaled = false;
    // The rows of WideRows, which are zero in `values`: [rows][N].
    std::vector<float> wide;
  };

  void Allocate();
  // Decodes rows into `inputs_` and, in pairs, x - x~ into `residual_`, from staged_rows_ on.
  // False, with nothing to be relied on, if a value is not finite.
  bool Stage(const TokenRows& x, const TokenRows* x_quantized, int64_t row, int64_t rows,
             Executor& executor);
  // Staged rows whose products are taken in float64, and those of them that are massive.
  struct WideRows {
    std::vector<int64_t> rows;
    std::vector<bool> massive;
  };
  WideRows FindWideRows();
  // Takes rows out of the staged ones; the squares of massive ones are added to `squares`.
  void TakeOut(const WideRows& wide, Staged& staged, std::vector<double>& squares) const;
  void ScaleColumns(Staged& staged, Executor& executor) const;
  void Fold(Executor& executor);
  // out += a^T b over the staged rows; out is laid out like `layout`'s panels
  // where `upper`, else a row-major square.
  void FoldInto(const Staged& a, const Staged& b, bool upper, double* out,
                const UpperTriangle<double>& layout, Executor& executor) const;
  absl::Status AppendRows(const TokenRows& x, const TokenRows* x_quantized, int64_t first_row,
                          int64_t rows, Executor& executor);

  int64_t features_;
  Statistics statistics_;
  // X~ (or X), and P = X - X~ where mismatched.
  Staged inputs_;
  Staged residual_;
  int64_t staged_rows_ = 0;
  // The largest magnitude in each staged row, of X~ and of P, piece by piece of the features as
  // Stage takes them: [pieces][kBlockRows].
  std::vector<float> largest_;
  // The median of these of the last block that was long enough; 0: there was none.
  float ordinary_ = 0;
  // Whether staged values may be so large or small that their squares leave float32.
  bool wide_range_ = false;
};

}  // namespace certiq::engine

#endif  // CERTIQ_ENGINE_GRAM_GRAM_H_
