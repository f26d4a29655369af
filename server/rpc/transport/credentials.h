// Clear text or TLS.

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
  // The server's certificate, followed by those between it and its authority.
  std::string cert;
  std::string key;
  // Authorities of client certificates; if given, clients must show one of theirs.
  std::string client_ca;

  bool enabled() const { return !cert.empty() || !key.empty() || !client_ca.empty(); }
};

// Clear text where no file is named, else TLS 1.2 or 1.3. INVALID_ARGUMENT naming the flags, and
// the file where one cannot be read, is not what it should be, or certificate and key are of two
// pairs. Warns of a certificate that is not valid today and a key that everyone may read.
//
// Files are read again every second, and connections made after that use what they hold. Files
// that do not serve at that time let no new connection in until they do; those there are stay.
absl::StatusOr<std::shared_ptr<grpc::ServerCredentials>> ServerCredentials(const TlsFiles& files,
                                                                           const Warn& warn);

// For a client on this machine of a server with these files: it must show the very certificate in
// files.cert, whatever name and dates that has. Shows that certificate as its own if the server
// asks for one.
absl::StatusOr<std::shared_ptr<grpc::ChannelCredentials>> ProbeCredentials(const TlsFiles& files);

}  // namespace certiq::server

#endif  // CERTIQ_RPC_TRANSPORT_CREDENTIALS_H_
