// Health probe of a server on this machine.

#ifndef CERTIQ_RPC_TRANSPORT_PROBE_H_
#define CERTIQ_RPC_TRANSPORT_PROBE_H_

#include <chrono>
#include <string>

#include "absl/status/status.h"
#include "rpc/transport/credentials.h"

namespace certiq::server {

// OK if the server that listens on `listen` answers grpc.health.v1.Health/Check with SERVING within
// `limit`, UNAVAILABLE with the reason if not. INVALID_ARGUMENT about the address or the files of
// `tls`, which are the server's own.
absl::Status Probe(const std::string& listen, const TlsFiles& tls, std::chrono::milliseconds limit);

}  // namespace certiq::server

#endif  // CERTIQ_RPC_TRANSPORT_PROBE_H_
