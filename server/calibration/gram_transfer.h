// Ready-made sums on their way in and out, in the form that clients know: X^T X, X~^T X~, X~^T X.

#ifndef CERTIQ_CALIBRATION_GRAM_TRANSFER_H_
#define CERTIQ_CALIBRATION_GRAM_TRANSFER_H_

#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "engine/gram/gram.h"
#include "engine/kernels/dtype.h"

namespace certiq::server {

// Symmetric matrices [N, N] whole, row-major, or by their upper triangles, row by row.
enum class MatrixLayout { kFull, kUpper };

// Takes sums in as their bytes come: X^T X; where mismatched then X~^T X~ and X~^T X, the last
// always whole. Errors are INVALID_ARGUMENT about "data". Not thread-safe.
class StatisticsImport {
 public:
  // REQUIRES: features >= 1, F64 or F32.
  StatisticsImport(int64_t features, bool mismatched, engine::DType dtype, MatrixLayout layout);

  // Memory it takes, the sums included.
  static int64_t BytesFor(int64_t features, bool mismatched);

  // Any whole number of elements. Refuses what is not finite (or beyond 1e100), not symmetric (to
  // 1e-5 of sqrt(H_ii H_jj)), and too much.
  absl::Status Append(std::span<const std::byte> bytes);
  // The sums of `tokens` tokens. Refuses too little, negative diagonals, and what no activations
  // have: |H_ij| > (1 + 1e-3) sqrt(H_ii H_jj), in X~^T X with (X~^T X~)_ii and (X^T X)_jj. Spends
  // the import.
  absl::StatusOr<engine::Statistics> Finish(int64_t tokens);

 private:
  enum class Part { kX, kQuantized, kCross, kEnd };

  absl::Status Take(double value);
  absl::Status CheckCross() const;
  engine::UpperTriangle<double>& triangle();
  void NextRow();

  const int64_t features_;
  const bool mismatched_;
  const engine::DType dtype_;
  const MatrixLayout layout_;
  Part part_ = Part::kX;
  int64_t row_ = 0;
  int64_t column_ = 0;
  std::vector<float> floats_;
  // X^T X; then X~^T X~ and X~^T X.
  engine::UpperTriangle<double> x_;
  engine::Statistics sums_;
};

// Gives sums out, float64. Not thread-safe.
class StatisticsExport {
 public:
  // Sums of zero tokens where `sums` is null.
  StatisticsExport(engine::SharedStatistics sums, int64_t features, bool mismatched,
                   MatrixLayout layout);

  // Fills `values` with the next elements, about `count` of them; none when all are out.
  void Next(int64_t count, std::vector<double>& values);

 private:
  double At(int part, int64_t i, int64_t j) const;

  const engine::SharedStatistics sums_;
  const int64_t features_;
  const int parts_;
  const MatrixLayout layout_;
  int part_ = 0;
  int64_t row_ = 0;
};

}  // namespace certiq::server

#endif  // CERTIQ_CALIBRATION_GRAM_TRANSFER_H_
