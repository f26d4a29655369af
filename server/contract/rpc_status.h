// The one place that turns absl::Status into grpc::Status.

#ifndef CERTIQ_CONTRACT_RPC_STATUS_H_
#define CERTIQ_CONTRACT_RPC_STATUS_H_

#include "absl/status/status.h"
#include "base/status.h"
#include "google/rpc/status.pb.h"

namespace certiq::server {

// Code and message, and what is attached as google.rpc messages in grpc-status-details-bin:
//   base::FieldOf         BadRequest
//   base::PreconditionOf  PreconditionFailure
//   base::RetryAfterOf      RetryInfo
// Messages are shortened to what fits the 8 KiB of metadata that clients accept by default.
google::rpc::Status ToRpcStatus(const absl::Status& status);

}  // namespace certiq::server

#endif  // CERTIQ_CONTRACT_RPC_STATUS_H_
