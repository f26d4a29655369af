// Health probe of a server on this machine.

#ifndef CERTIQ_RPC_TRANSPORT_PROBE_H_
#define CERTIQ_RPC_TRANSPORT_PROBE_H_

#include <chrono>
#include <functional>
#include <string>

#include "absl/status/status.h"
#include "base/address.h"
#include "rpc/transport/credentials.h"

namespace certiq::server {

// OK if the server that listens on `listen` answers grpc.health.v1.Health/Check with SERVING within
// `limit`, UNAVAILABLE with the reason if not. INVALID_ARGUMENT about the address or the files of
// `tls`, which are the server's own.
absl::Status Probe(const std::string& listen, const TlsFiles& tls, std::chrono::milliseconds limit);

// OK if what listens on `address`, of this machine, takes a new connection and answers it: with
// SETTINGS of HTTP/2, or in a TLS handshake, whatever that ends with. It shows no certificate and
// asks for no call, so that nothing but the listener decides. UNAVAILABLE with the reason if not.
// `connecting` is told the port that the connection will come from, 0 for unix, before it does.
absl::Status ProbeListener(const base::Address& address, bool tls, std::chrono::milliseconds limit,
                           const std::function<void(int)>& connecting);

}  // namespace certiq::server

#endif  // CERTIQ_RPC_TRANSPORT_PROBE_H_
