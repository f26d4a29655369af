// Calibrations as messages.

#ifndef CERTIQ_RPC_SERVICES_CONVERT_CALIBRATION_H_
#define CERTIQ_RPC_SERVICES_CONVERT_CALIBRATION_H_

#include <cstdint>
#include <string>

#include "absl/status/statusor.h"
#include "calibration/calibration_desk.h"
#include "calibration/gram_transfer.h"
#include "certiq/v1/calibration_service.pb.h"
#include "engine/kernels/dtype.h"

namespace certiq::server {

// INVALID_ARGUMENT of every Read naming the field, what was expected and what came.
absl::StatusOr<CalibrationRequest> ReadCreateRequest(const v1::CreateCalibrationRequest& request);

// An Accumulate header, all but the calibration it names.
struct AccumulateRequest {
  std::string stream_id;
  engine::DType x = engine::DType::kF32;
  engine::DType x_quantized = engine::DType::kF32;
};
absl::StatusOr<AccumulateRequest> ReadAccumulateHeader(const v1::AccumulateHeader& header,
                                                       bool mismatched);

// A header of ready-made sums.
struct ImportRequest {
  std::string stream_id;
  int64_t tokens = 0;
  bool held_out = false;
  engine::DType dtype = engine::DType::kF64;
  MatrixLayout layout = MatrixLayout::kFull;
};
absl::StatusOr<ImportRequest> ReadStatisticsHeader(const v1::StatisticsHeader& header,
                                                   const CalibrationRecord& calibration);

// True: held out.
absl::StatusOr<bool> ReadPortion(v1::Portion portion);
absl::StatusOr<MatrixLayout> ReadLayout(v1::MatrixLayout layout, MatrixLayout unset);
v1::CalibrationKind KindOf(bool mismatched);

v1::StreamProgress ToProto(const StreamView& stream);
v1::Calibration ToProto(const CalibrationView& view);

}  // namespace certiq::server

#endif  // CERTIQ_RPC_SERVICES_CONVERT_CALIBRATION_H_
