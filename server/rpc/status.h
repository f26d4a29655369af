// The one place that turns absl::Status into grpc::Status.

#ifndef CERTIQ_RPC_STATUS_H_
#define CERTIQ_RPC_STATUS_H_

#include <grpcpp/support/status.h>

#include "absl/status/status.h"
#include "google/rpc/status.pb.h"

namespace certiq::rpc {

// Code and message, and what is attached as google.rpc messages in grpc-status-details-bin:
//   engine::FieldOf         BadRequest
//   engine::PreconditionOf  PreconditionFailure
//   jobs::RetryAfterOf      RetryInfo
// Messages are shortened to what fits the 8 KiB of metadata that clients accept by default.
google::rpc::Status ToRpcStatus(const absl::Status& status);
grpc::Status ToGrpc(const absl::Status& status);

}  // namespace certiq::rpc

#endif  // CERTIQ_RPC_STATUS_H_
