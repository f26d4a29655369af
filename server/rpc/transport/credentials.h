// Transport credentials: TLS or clear text.

#ifndef CERTIQ_RPC_TRANSPORT_CREDENTIALS_H_
#define CERTIQ_RPC_TRANSPORT_CREDENTIALS_H_

#include <grpcpp/security/credentials.h>
#include <grpcpp/security/server_credentials.h>

#include <memory>
#include <string>

#include "absl/status/statusor.h"
#include "rpc/transport/file.h"

namespace certiq::server {

// Paths of PEM files, as the flags --tls_cert, --tls_key and --tls_client_ca name them.
struct TlsFiles {
  // The server's certificate, followed by the intermediate certificates up to its authority.
  std::string cert;
  std::string key;
  // Authorities of client certificates; if given, clients must show one of theirs.
  std::string client_ca;

  bool enabled() const { return !cert.empty() || !key.empty() || !client_ca.empty(); }
};

// Clear text if no file is named, else TLS 1.2 or 1.3. INVALID_ARGUMENT that names the flag and the
// file if one is missing, cannot be read or parsed, or if certificate and key do not match. Warns
// about a certificate that is not valid today and about a key that every user may read.
//
// gRPC reads the files again every second; new connections use what it read. While the files are
// unusable no new connection succeeds; existing ones stay.
absl::StatusOr<std::shared_ptr<grpc::ServerCredentials>> ServerCredentials(const TlsFiles& files,
                                                                           const Warn& warn);

// INVALID_ARGUMENT, beginning with the flag, where the file of authorities holds none that can be
// read now. REQUIRES: files.client_ca is not empty.
absl::Status CheckAuthorities(const TlsFiles& files, const Warn& warn = nullptr);

// For a client on this machine of a server with these files. It accepts the certificate in
// files.cert, whatever its name and dates, and no other; it presents that certificate as its own if
// the server asks for one.
absl::StatusOr<std::shared_ptr<grpc::ChannelCredentials>> ProbeCredentials(const TlsFiles& files);

}  // namespace certiq::server

#endif  // CERTIQ_RPC_TRANSPORT_CREDENTIALS_H_
