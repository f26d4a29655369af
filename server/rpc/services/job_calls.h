// JobService.

#ifndef CERTIQ_RPC_SERVICES_JOB_CALLS_H_
#define CERTIQ_RPC_SERVICES_JOB_CALLS_H_

#include <grpcpp/impl/service_type.h>

#include <memory>

#include "rpc/calls/call_life.h"

namespace certiq::server {

// The environment outlives the service.
std::unique_ptr<grpc::Service> MakeJobService(const CallEnvironment& environment);

}  // namespace certiq::server

#endif  // CERTIQ_RPC_SERVICES_JOB_CALLS_H_
