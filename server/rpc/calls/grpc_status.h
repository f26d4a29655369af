// Statuses as gRPC sends them: the one place that maps errors.

#ifndef CERTIQ_RPC_CALLS_GRPC_STATUS_H_
#define CERTIQ_RPC_CALLS_GRPC_STATUS_H_

#include <grpcpp/support/status.h>

#include "absl/status/status.h"
#include "contract/rpc_status.h"

namespace certiq::server {

// Details travel in grpc-status-details-bin.
inline grpc::Status ToGrpc(const absl::Status& status) {
  if (status.ok()) return grpc::Status::OK;
  const google::rpc::Status details = ToRpcStatus(status);
  // The numbers of the codes are the same in both.
  return {static_cast<grpc::StatusCode>(status.code()), details.message(),
          details.SerializeAsString()};
}

}  // namespace certiq::server

#endif  // CERTIQ_RPC_CALLS_GRPC_STATUS_H_
