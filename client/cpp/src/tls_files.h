// The files of TlsOptions, read and checked.
#ifndef CERTIQ_CLIENT_CPP_SRC_TLS_FILES_H_
#define CERTIQ_CLIENT_CPP_SRC_TLS_FILES_H_

#include <string>

#include "absl/status/statusor.h"
#include "certiq/client.h"

namespace certiq {

// PEM; empty where TlsOptions names no file.
struct TlsFiles {
  std::string ca;
  std::string cert;
  std::string key;
};

// INVALID_ARGUMENT naming the option and the file where one cannot be read, holds something else,
// or certificate and key do not belong together. gRPC itself would only log these.
absl::StatusOr<TlsFiles> ReadTlsFiles(const TlsOptions& options);

}  // namespace certiq

#endif  // CERTIQ_CLIENT_CPP_SRC_TLS_FILES_H_
