// Observer of RPCs, and the list of RPCs; free of gRPC.

#ifndef CERTIQ_OBSERVABILITY_CALL_OBSERVER_H_
#define CERTIQ_OBSERVABILITY_CALL_OBSERVER_H_

#include <array>

#include "absl/status/status.h"

namespace certiq::server {

// Whether requests and answers of an RPC are one message or a stream.
enum class CallShape { kUnary, kClientStream, kServerStream, kBidiStream };

constexpr bool StreamsRequests(CallShape shape) {
  return shape == CallShape::kClientStream || shape == CallShape::kBidiStream;
}
constexpr bool StreamsAnswers(CallShape shape) {
  return shape == CallShape::kServerStream || shape == CallShape::kBidiStream;
}

// One of the server's RPCs. The strings are literals of a closed set.
struct RpcMethod {
  // "certiq.v1.QuantizationService"
  const char* service;
  // "Quantize"
  const char* method;
  CallShape shape;
};

// The RPCs of certiq.v1. Observers prepare for these and may ignore others.
inline constexpr RpcMethod kQuantizeMethod{"certiq.v1.QuantizationService", "Quantize",
                                           CallShape::kBidiStream};
inline constexpr RpcMethod kCreateCalibrationMethod{"certiq.v1.CalibrationService",
                                                    "CreateCalibration", CallShape::kUnary};
inline constexpr RpcMethod kAccumulateMethod{"certiq.v1.CalibrationService", "Accumulate",
                                             CallShape::kBidiStream};
inline constexpr RpcMethod kImportStatisticsMethod{"certiq.v1.CalibrationService",
                                                   "ImportStatistics", CallShape::kClientStream};
inline constexpr RpcMethod kExportStatisticsMethod{"certiq.v1.CalibrationService",
                                                   "ExportStatistics", CallShape::kServerStream};
inline constexpr RpcMethod kFinalizeCalibrationMethod{"certiq.v1.CalibrationService",
                                                      "FinalizeCalibration", CallShape::kUnary};
inline constexpr RpcMethod kGetCalibrationMethod{"certiq.v1.CalibrationService", "GetCalibration",
                                                 CallShape::kUnary};
inline constexpr RpcMethod kListCalibrationsMethod{"certiq.v1.CalibrationService",
                                                   "ListCalibrations", CallShape::kUnary};
inline constexpr RpcMethod kDeleteCalibrationMethod{"certiq.v1.CalibrationService",
                                                    "DeleteCalibration", CallShape::kUnary};
inline constexpr RpcMethod kCreateJobMethod{"certiq.v1.JobService", "CreateJob",
                                            CallShape::kClientStream};
inline constexpr RpcMethod kGetJobMethod{"certiq.v1.JobService", "GetJob", CallShape::kUnary};
inline constexpr RpcMethod kListJobsMethod{"certiq.v1.JobService", "ListJobs", CallShape::kUnary};
inline constexpr RpcMethod kCancelJobMethod{"certiq.v1.JobService", "CancelJob", CallShape::kUnary};
inline constexpr RpcMethod kDeleteJobMethod{"certiq.v1.JobService", "DeleteJob", CallShape::kUnary};
inline constexpr RpcMethod kWatchJobMethod{"certiq.v1.JobService", "WatchJob",
                                           CallShape::kServerStream};
inline constexpr RpcMethod kReadResultMethod{"certiq.v1.JobService", "ReadResult",
                                             CallShape::kServerStream};
inline constexpr std::array kRpcMethods = {kQuantizeMethod,
                                           kCreateCalibrationMethod,
                                           kAccumulateMethod,
                                           kImportStatisticsMethod,
                                           kExportStatisticsMethod,
                                           kFinalizeCalibrationMethod,
                                           kGetCalibrationMethod,
                                           kListCalibrationsMethod,
                                           kDeleteCalibrationMethod,
                                           kCreateJobMethod,
                                           kGetJobMethod,
                                           kListJobsMethod,
                                           kCancelJobMethod,
                                           kDeleteJobMethod,
                                           kWatchJobMethod,
                                           kReadResultMethod};

// Receives events of calls; every handler does nothing by default. Thread-safe; handlers do not
// block.
class CallObserver {
 public:
  virtual ~CallObserver() = default;

  virtual void CallStarted(const RpcMethod& /*method*/) {}
  virtual void MessageReceived(const RpcMethod& /*method*/) {}
  virtual void MessageSent(const RpcMethod& /*method*/) {}
  // The call ended with `code`, `seconds` after it started.
  virtual void CallHandled(const RpcMethod& /*method*/, absl::StatusCode /*code*/,
                           double /*seconds*/) {}
};

// An observer that ignores every call.
inline CallObserver& IgnoreCalls() {
  static CallObserver observer;
  return observer;
}

}  // namespace certiq::server

#endif  // CERTIQ_OBSERVABILITY_CALL_OBSERVER_H_
