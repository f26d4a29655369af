// CalibrationService.

#ifndef CERTIQ_RPC_CALIBRATION_CALLS_H_
#define CERTIQ_RPC_CALIBRATION_CALLS_H_

#include <memory>

#include <grpcpp/impl/service_type.h>

#include "rpc/call_life.h"

namespace certiq::rpc {

// The environment outlives the service.
std::unique_ptr<grpc::Service> MakeCalibrationService(const CallEnvironment& environment);

}  // namespace certiq::rpc

#endif  // CERTIQ_RPC_CALIBRATION_CALLS_H_
