// The services of the contract.

#ifndef CERTIQ_RPC_SERVICES_SERVICES_H_
#define CERTIQ_RPC_SERVICES_SERVICES_H_

#include <grpcpp/impl/service_type.h>

#include <memory>

#include "rpc/calls/call_life.h"

namespace certiq::server {

// The environment outlives the services.
std::unique_ptr<grpc::Service> MakeQuantizationService(const CallEnvironment& environment);
std::unique_ptr<grpc::Service> MakeCalibrationService(const CallEnvironment& environment);
std::unique_ptr<grpc::Service> MakeJobService(const CallEnvironment& environment);

}  // namespace certiq::server

#endif  // CERTIQ_RPC_SERVICES_SERVICES_H_
