// The services of the contract.

#ifndef CERTIQ_RPC_SERVICES_SERVICES_H_
#define CERTIQ_RPC_SERVICES_SERVICES_H_

#include "rpc/calls/router.h"

namespace certiq::server {

// Each adds the methods of one service.
void AddQuantizationMethods(Router& router);
void AddCalibrationMethods(Router& router);
void AddJobMethods(Router& router);

}  // namespace certiq::server

#endif  // CERTIQ_RPC_SERVICES_SERVICES_H_
