#include "contract/limits.h"

#include "absl/strings/str_cat.h"
#include "base/status.h"
#include "base/status_macros.h"

namespace certiq::server {

using base::InvalidField;

absl::Status CheckSize(absl::string_view field, absl::string_view what, int64_t value,
                       int64_t limit) {
  if (value >= 1 && value <= limit) return absl::OkStatus();
  return InvalidField(field, absl::StrCat("expected 1 to ", limit, " ", what, ", got ", value));
}

absl::Status CheckWeight(int64_t rows, int64_t features, engine::DType dtype) {
  RETURN_IF_ERROR(CheckSize("weight.shape", "rows (output channels)", rows, kMaxRows));
  RETURN_IF_ERROR(CheckSize("weight.shape", "columns (input features)", features, kMaxFeatures));
  int64_t weights = 0;
  if (__builtin_mul_overflow(rows, features, &weights) || weights > kMaxWeights) {
    return InvalidField("weight.shape", absl::StrCat("expected at most ", kMaxWeights,
                                                     " elements, got ", rows, " x ", features));
  }
  if (engine::IsFloating(dtype)) return absl::OkStatus();
  return InvalidField("weight.dtype",
                      absl::StrCat("expected a floating type, got ", engine::Name(dtype)));
}

absl::Status CheckName(absl::string_view field, absl::string_view value, size_t limit) {
  if (value.size() <= limit) return absl::OkStatus();
  return InvalidField(
      field, absl::StrCat("expected at most ", limit, " bytes, got ", value.size(), " bytes"));
}

absl::StatusOr<int64_t> RowsIn(absl::string_view chunk, absl::string_view data, int64_t row_bytes,
                               int64_t row_offset, int64_t rows_before, int64_t rows_in_all,
                               int64_t bytes) {
  if (row_offset != rows_before) {
    return InvalidField(
        absl::StrCat(chunk, ".row_offset"),
        absl::StrCat("expected ", rows_before, ", the rows sent before, got ", row_offset));
  }
  if (bytes == 0 || bytes % row_bytes != 0) {
    return InvalidField(data, absl::StrCat("expected whole rows of ", row_bytes,
                                           " bytes, at least one, got ", bytes, " bytes"));
  }
  const int64_t rows = bytes / row_bytes;
  if (rows > rows_in_all - rows_before) {
    return InvalidField(
        data, absl::StrCat("expected at most the ", rows_in_all - rows_before,
                           " rows that are left of the shape's ", rows_in_all, ", got ", rows));
  }
  return rows;
}

}  // namespace certiq::server
