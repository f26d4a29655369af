// Sums of activations made elsewhere: X^T X and, where inputs are mismatched, X~^T X~ and X~^T X.
#ifndef CERTIQ_CLIENT_CPP_INCLUDE_CERTIQ_STATISTICS_H_
#define CERTIQ_CLIENT_CPP_INCLUDE_CERTIQ_STATISTICS_H_

#include <cstdint>
#include <map>
#include <optional>
#include <string>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "certiq/safetensors.h"
#include "certiq/tensor.h"
#include "certiq/v1/calibration_service.pb.h"

namespace certiq {

// Sums whose bytes belong to someone else. All of one dtype, F64 or F32. A symmetric one is
// [N, N], or [N (N + 1) / 2]: the upper triangle, row by row from the diagonal on.
struct StatisticsView {
  // Tokens summed; at least 1 to be imported.
  int64_t tokens = 0;
  v1::Portion portion = v1::PORTION_FIT;
  TensorView gram = {};
  // Laid out as gram. Both or none.
  std::optional<TensorView> gram_quantized = {};
  // X~^T X [N, N]; element (i, j) sums feature i of X~ with feature j of X.
  std::optional<TensorView> cross = {};
};

// What the shapes say.
struct StatisticsShape {
  int64_t features = 0;
  v1::MatrixLayout layout = v1::MATRIX_LAYOUT_FULL;
  v1::CalibrationKind kind = v1::CALIBRATION_KIND_MATCHED;
  v1::DataType dtype = v1::DATA_TYPE_F64;
};

// INVALID_ARGUMENT, naming the tensor, where shapes, dtypes and sizes do not fit together. Values
// are the server's to judge.
absl::StatusOr<StatisticsShape> ShapeOf(const StatisticsView& statistics);

// Sums that own their bytes.
struct Statistics {
  int64_t tokens = 0;
  v1::Portion portion = v1::PORTION_FIT;
  OwnedTensor gram = {};
  std::optional<OwnedTensor> gram_quantized = {};
  std::optional<OwnedTensor> cross = {};

  StatisticsView View() const;
};

// Names of the tensors in a file.
struct StatisticsNames {
  std::string gram = "gram";
  // Empty: none.
  std::string gram_quantized = {};
  std::string cross = {};
};

// The tensors "gram", "gram_quantized" and "cross", on disk but for Commit(); tokens and portion
// go into the metadata. Errors as StageSafetensors.
absl::StatusOr<AtomicFile> StageStatistics(const std::string& path,
                                           const StatisticsView& statistics);

// What a file says of itself; unset where it says nothing.
struct StatisticsMetadata {
  std::optional<int64_t> tokens = {};
  std::optional<v1::Portion> portion = {};
  // It was written by StageStatistics with sums of X~.
  bool mismatched = false;
};

// INVALID_ARGUMENT, naming the file, for metadata of StageStatistics that cannot be read.
absl::StatusOr<StatisticsMetadata> ReadStatisticsMetadata(const SafetensorsFile& file);

// The tensors of these names without a copy; valid as long as `file`. tokens and portion are left
// at their defaults. Errors as SafetensorsFile::Tensor.
absl::StatusOr<StatisticsView> ReadStatistics(const SafetensorsFile& file,
                                              const StatisticsNames& names);

}  // namespace certiq

#endif  // CERTIQ_CLIENT_CPP_INCLUDE_CERTIQ_STATISTICS_H_
