#include "tls_files.h"

#include <openssl/bio.h>
#include <openssl/err.h>
#include <openssl/evp.h>
#include <openssl/pem.h>
#include <openssl/x509.h>

#include <fstream>
#include <memory>

#include "absl/status/status.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/string_view.h"
#include "base/status_macros.h"

namespace certiq {
namespace {

constexpr size_t kMaxFileBytes = 1 << 20;

template <typename T, void (*kFree)(T*)>
struct Free {
  void operator()(T* object) const { kFree(object); }
};
using X509Pointer = std::unique_ptr<X509, Free<X509, X509_free>>;
using KeyPointer = std::unique_ptr<EVP_PKEY, Free<EVP_PKEY, EVP_PKEY_free>>;
using BioPointer = std::unique_ptr<BIO, Free<BIO, BIO_free_all>>;

absl::Status Wrong(const char* option, const std::string& path, absl::string_view problem) {
  return absl::InvalidArgumentError(absl::StrCat("tls.", option, ": ", path, ": ", problem));
}

absl::StatusOr<std::string> Read(const char* option, const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  std::string text(kMaxFileBytes, '\0');
  file.read(text.data(), static_cast<std::streamsize>(text.size()));
  text.resize(static_cast<size_t>(file.gcount()));
  if (!file.eof()) return Wrong(option, path, "cannot read it");
  return text;
}

BioPointer Reader(const std::string& pem) {
  return BioPointer(BIO_new_mem_buf(pem.data(), static_cast<int>(pem.size())));
}

// Keys with a password are not supported: there is nobody to ask for it.
int NoPassword(char* /*buffer*/, int /*size*/, int /*writing*/, void* /*data*/) { return 0; }

}  // namespace

absl::StatusOr<TlsFiles> ReadTlsFiles(const TlsOptions& options) {
  if (options.cert_file.empty() != options.key_file.empty()) {
    return absl::InvalidArgumentError("tls.cert_file and tls.key_file: expected both or none");
  }
  TlsFiles files;
  X509Pointer cert;
  KeyPointer key;
  if (!options.ca_file.empty()) {
    ASSIGN_OR_RETURN(files.ca, Read("ca_file", options.ca_file));
    if (X509Pointer(PEM_read_bio_X509(Reader(files.ca).get(), nullptr, nullptr, nullptr)) ==
        nullptr) {
      ERR_clear_error();
      return Wrong("ca_file", options.ca_file, "expected certificates in PEM");
    }
  }
  if (options.cert_file.empty()) return files;
  ASSIGN_OR_RETURN(files.cert, Read("cert_file", options.cert_file));
  cert.reset(PEM_read_bio_X509(Reader(files.cert).get(), nullptr, nullptr, nullptr));
  ASSIGN_OR_RETURN(files.key, Read("key_file", options.key_file));
  key.reset(PEM_read_bio_PrivateKey(Reader(files.key).get(), nullptr, &NoPassword, nullptr));
  const bool match =
      cert != nullptr && key != nullptr && X509_check_private_key(cert.get(), key.get()) == 1;
  // Failures leave a trace in a queue of the thread, where TLS would find it.
  ERR_clear_error();
  if (cert == nullptr)
    return Wrong("cert_file", options.cert_file, "expected a certificate in PEM");
  if (key == nullptr) {
    return Wrong("key_file", options.key_file, "expected a private key in PEM without a password");
  }
  if (!match) {
    return Wrong("key_file", options.key_file,
                 absl::StrCat("is not the key of the certificate in ", options.cert_file));
  }
  return files;
}

}  // namespace certiq
