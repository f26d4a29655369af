// The stored form of a calibration's sums.

#ifndef CERTIQ_CALIBRATION_GRAM_FILE_H_
#define CERTIQ_CALIBRATION_GRAM_FILE_H_

#include <cstdint>
#include <optional>
#include <string>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "engine/gram/gram.h"
#include "store/blobs.h"
#include "store/records.h"

namespace certiq::server {

// The sums of one portion: the upper triangle of X~^T X~ row by row, float64 little-endian; where
// mismatched then that of P^T P and all of P^T X~.
int64_t StatisticsBlobBytes(int64_t features, bool mismatched);

// The bytes of all sums of a calibration: those to fit, then those held out where there are any. A
// blob of sums with massive tokens has a row or two more for each portion.
int64_t SumsBytes(const CalibrationRecord& calibration);

// Sums in the blob store.
struct StoredSums {
  BlobRef blob;
  // Lowercase hex, of the blob's bytes.
  std::string sha256;
};

// Writes both portions as one blob; `held_out` may be null.
absl::StatusOr<StoredSums> WriteSums(Blobs& blobs, const engine::Statistics& fit,
                                     const engine::Statistics* held_out);

// The sums that a record names, with its token counts.
struct LoadedSums {
  engine::Statistics fit;
  std::optional<engine::Statistics> held_out;
};
absl::StatusOr<LoadedSums> ReadSums(Blobs& blobs, const CalibrationRecord& calibration);

}  // namespace certiq::server

#endif  // CERTIQ_CALIBRATION_GRAM_FILE_H_
