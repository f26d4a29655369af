// Sums of a calibration as stored bytes.

#ifndef CERTIQ_CALIBRATION_GRAM_FILE_H_
#define CERTIQ_CALIBRATION_GRAM_FILE_H_

#include <cstddef>
#include <cstdint>
#include <functional>
#include <span>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "engine/gram/gram.h"
#include "store/store.h"

namespace certiq::server {

// The sums of one portion: the upper triangle of X~^T X~ row by row, float64 little-endian; where
// mismatched then that of P^T P and all of P^T X~.
int64_t StatisticsBlobBytes(int64_t features, bool mismatched);

// Takes bytes as they are made.
using ByteSink = std::function<absl::Status(std::span<const std::byte>)>;

absl::Status WriteStatistics(const engine::Statistics& sums, const ByteSink& sink);
// Reads what WriteStatistics wrote at `offset`; the token count is not part of it.
absl::StatusOr<engine::Statistics> ReadStatistics(const BlobReader& blob, int64_t offset,
                                                  int64_t features, bool mismatched);

}  // namespace certiq::server

#endif  // CERTIQ_CALIBRATION_GRAM_FILE_H_
