// The limits of the contract, and checks of what is sent against them.

#ifndef CERTIQ_CONTRACT_LIMITS_H_
#define CERTIQ_CONTRACT_LIMITS_H_

#include <cstddef>
#include <cstdint>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "engine/kernels/dtype.h"

namespace certiq::server {

// The largest sizes taken. A product of any two of them, times 8 bytes, fits int64.
inline constexpr int64_t kMaxFeatures = 65536;
inline constexpr int64_t kMaxRows = 1048576;
inline constexpr int64_t kMaxTokens = int64_t{1} << 40;
inline constexpr int64_t kMaxWeights = int64_t{1} << 34;
inline constexpr int64_t kMaxMessageBytes = int64_t{16} << 20;

inline constexpr size_t kMaxRequestIdBytes = 128;
inline constexpr size_t kMaxNameBytes = 256;
// A spec without the values of an explicit grid, of which the layer says how many there are.
inline constexpr size_t kMaxSpecBytes = size_t{16} << 10;

// How long calibrations and jobs are kept where the request says nothing.
inline constexpr int64_t kDefaultTtlMicros = int64_t{24} * 3600 * 1000000;

// INVALID_ARGUMENT unless 1 <= value <= limit; `what` says what is counted: "rows (tokens)".
absl::Status CheckSize(absl::string_view field, absl::string_view what, int64_t value,
                       int64_t limit);

// W [rows, features] of this type: INVALID_ARGUMENT beyond the limits above, and where it is not a
// floating one.
absl::Status CheckWeight(int64_t rows, int64_t features, engine::DType dtype);

// INVALID_ARGUMENT where a name is longer than `limit` bytes.
absl::Status CheckName(absl::string_view field, absl::string_view value, size_t limit);

// The rows in a piece of `bytes` bytes, which starts at `row_offset` and follows `rows_before` of
// `rows_in_all` rows: INVALID_ARGUMENT about "<chunk>.row_offset" or `data` where that is not so.
absl::StatusOr<int64_t> RowsIn(absl::string_view chunk, absl::string_view data, int64_t row_bytes,
                               int64_t row_offset, int64_t rows_before, int64_t rows_in_all,
                               int64_t bytes);

}  // namespace certiq::server

#endif  // CERTIQ_CONTRACT_LIMITS_H_
