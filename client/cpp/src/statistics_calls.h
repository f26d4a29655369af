// ImportStatistics and ExportStatistics calls.
#ifndef CERTIQ_CLIENT_CPP_SRC_STATISTICS_CALLS_H_
#define CERTIQ_CLIENT_CPP_SRC_STATISTICS_CALLS_H_

#include <string>

#include "absl/status/statusor.h"
#include "certiq/client.h"
#include "certiq/statistics.h"
#include "certiq/v1/calibration_service.grpc.pb.h"
#include "connection.h"

namespace certiq {

using CalibrationConnection = ServiceConnection<v1::CalibrationService>;

// As CalibrationClient::Import and Export.
absl::StatusOr<v1::ImportStatisticsResponse> ImportStatistics(
    const CalibrationConnection& connection, const std::string& calibration_id,
    const std::string& stream_id, const StatisticsView& statistics, const CallOptions& options);
absl::StatusOr<Statistics> ExportStatistics(const CalibrationConnection& connection,
                                            const std::string& calibration_id, v1::Portion portion,
                                            v1::MatrixLayout layout, const CallOptions& options);

}  // namespace certiq

#endif  // CERTIQ_CLIENT_CPP_SRC_STATISTICS_CALLS_H_
