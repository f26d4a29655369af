#include "rpc/transport/credentials.h"

#include <grpc/grpc_security_constants.h>
#include <grpcpp/security/tls_certificate_provider.h>
#include <grpcpp/security/tls_certificate_verifier.h>
#include <grpcpp/security/tls_credentials_options.h>
#include <openssl/bio.h>
#include <openssl/err.h>
#include <openssl/evp.h>
#include <openssl/pem.h>
#include <openssl/x509.h>

#include <functional>
#include <utility>
#include <vector>

#include "absl/status/status.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/string_view.h"
#include "base/status_macros.h"

namespace certiq::server {
namespace {

constexpr unsigned int kReloadSeconds = 1;

template <typename T, void (*kFree)(T*)>
struct Free {
  void operator()(T* object) const { kFree(object); }
};
using Certificate = std::unique_ptr<X509, Free<X509, X509_free>>;
using Key = std::unique_ptr<EVP_PKEY, Free<EVP_PKEY, EVP_PKEY_free>>;
using Bio = std::unique_ptr<BIO, Free<BIO, BIO_free_all>>;

// Clears OpenSSL's error queue of this thread, where gRPC's TLS would find old errors.
struct ClearErrors {
  ~ClearErrors() { ERR_clear_error(); }
};

Bio Reader(absl::string_view pem) {
  return Bio(BIO_new_mem_buf(pem.data(), static_cast<int>(pem.size())));
}

// A password callback that has none: there is no terminal to ask.
int NoPassword(char* /*buffer*/, int /*size*/, int /*writing*/, void* /*data*/) { return 0; }

// The first certificate of the text; null if there is none.
Certificate ReadCertificate(absl::string_view pem) {
  const ClearErrors clear;
  return Certificate(PEM_read_bio_X509(Reader(pem).get(), nullptr, &NoPassword, nullptr));
}

Key ReadKey(absl::string_view pem) {
  const ClearErrors clear;
  return Key(PEM_read_bio_PrivateKey(Reader(pem).get(), nullptr, &NoPassword, nullptr));
}

bool Match(const Certificate& certificate, const Key& key) {
  const ClearErrors clear;
  return X509_check_private_key(certificate.get(), key.get()) == 1;
}

absl::Status Wrong(const char* flag, const std::string& path, absl::string_view problem) {
  return absl::InvalidArgumentError(absl::StrCat(flag, ": ", path, ": ", problem));
}

absl::StatusOr<std::string> Read(const char* flag, const std::string& path) {
  absl::StatusOr<std::string> text = ReadSmallFile(path);
  if (!text.ok()) return Wrong(flag, path, text.status().message());
  return text;
}

// "has expired" or "is not valid yet"; empty if the certificate is valid today.
std::string DateProblem(const Certificate& certificate) {
  if (X509_cmp_current_time(X509_get0_notAfter(certificate.get())) < 0) return "has expired";
  if (X509_cmp_current_time(X509_get0_notBefore(certificate.get())) > 0) return "is not valid yet";
  return "";
}

absl::Status CheckFlags(const TlsFiles& files) {
  if (files.cert.empty() != files.key.empty()) {
    return absl::InvalidArgumentError(absl::StrCat(
        files.cert.empty() ? "--tls_key" : "--tls_cert", ": expected ",
        files.cert.empty() ? "--tls_cert" : "--tls_key", " beside it, or none of the two"));
  }
  if (!files.client_ca.empty() && files.cert.empty()) {
    return absl::InvalidArgumentError(
        "--tls_client_ca: expected --tls_cert and --tls_key beside it");
  }
  return absl::OkStatus();
}

// The texts of certificate and key, which were found to be a pair.
absl::StatusOr<grpc::experimental::IdentityKeyCertPair> ReadIdentity(const TlsFiles& files,
                                                                     const Warn& warn) {
  ASSIGN_OR_RETURN(std::string cert_text, Read("--tls_cert", files.cert));
  const Certificate certificate = ReadCertificate(cert_text);
  if (certificate == nullptr) {
    return Wrong("--tls_cert", files.cert, "expected a certificate in PEM");
  }
  ASSIGN_OR_RETURN(std::string key_text, Read("--tls_key", files.key));
  const Key key = ReadKey(key_text);
  if (key == nullptr) {
    return Wrong("--tls_key", files.key, "expected a private key in PEM without a password");
  }
  if (!Match(certificate, key)) {
    return Wrong("--tls_key", files.key,
                 absl::StrCat("is not the key of the certificate in ", files.cert));
  }
  if (const std::string problem = DateProblem(certificate); warn && !problem.empty()) {
    warn(absl::StrCat("--tls_cert: ", files.cert, ": the certificate ", problem,
                      "; clients will refuse it"));
  }
  if (warn && OpenToOthers(files.key)) {
    warn(absl::StrCat("--tls_key: ", files.key,
                      ": every user of this machine may read or write it; chmod o-rwx"));
  }
  return grpc::experimental::IdentityKeyCertPair{.private_key = std::move(key_text),
                                                 .certificate_chain = std::move(cert_text)};
}

// Accepts one certificate only. The handshake has proved that the peer has its key.
class SameCertificate final : public grpc::experimental::ExternalCertificateVerifier {
 public:
  explicit SameCertificate(std::string pem) : pem_(std::move(pem)) {}

  bool Verify(grpc::experimental::TlsCustomVerificationCheckRequest* request,
              std::function<void(grpc::Status)> /*callback*/, grpc::Status* status) override {
    const grpc::string_ref shown = request->peer_cert();
    const Certificate theirs = ReadCertificate({shown.data(), shown.size()});
    const Certificate ours = ReadCertificate(pem_);
    if (theirs == nullptr || ours == nullptr || X509_cmp(theirs.get(), ours.get()) != 0) {
      *status = {grpc::StatusCode::UNAUTHENTICATED, "not the certificate in --tls_cert"};
    }
    return true;
  }
  void Cancel(grpc::experimental::TlsCustomVerificationCheckRequest* /*request*/) override {}

 private:
  const std::string pem_;
};

}  // namespace

absl::Status CheckAuthorities(const TlsFiles& files, const Warn& warn) {
  const std::string& path = files.client_ca;
  ASSIGN_OR_RETURN(const std::string text, Read("--tls_client_ca", path));
  const Certificate first = ReadCertificate(text);
  if (first == nullptr) return Wrong("--tls_client_ca", path, "expected certificates in PEM");
  if (const std::string problem = DateProblem(first); warn && !problem.empty()) {
    warn(absl::StrCat("--tls_client_ca: ", path, ": its first certificate ", problem));
  }
  return absl::OkStatus();
}

absl::StatusOr<std::shared_ptr<grpc::ServerCredentials>> ServerCredentials(const TlsFiles& files,
                                                                           const Warn& warn) {
  if (!files.enabled()) return grpc::InsecureServerCredentials();
  RETURN_IF_ERROR(CheckFlags(files));
  // gRPC would log an unusable file and listen all the same, so the files are read here first.
  RETURN_IF_ERROR(ReadIdentity(files, warn).status());
  if (!files.client_ca.empty()) RETURN_IF_ERROR(CheckAuthorities(files, warn));
  grpc::experimental::TlsServerCredentialsOptions options(
      std::make_shared<grpc::experimental::FileWatcherCertificateProvider>(
          files.key, files.cert, files.client_ca, kReloadSeconds));
  options.watch_identity_key_cert_pairs();
  if (!files.client_ca.empty()) {
    options.watch_root_certs();
    options.set_cert_request_type(GRPC_SSL_REQUEST_AND_REQUIRE_CLIENT_CERTIFICATE_AND_VERIFY);
  }
  return grpc::experimental::TlsServerCredentials(options);
}

absl::StatusOr<std::shared_ptr<grpc::ChannelCredentials>> ProbeCredentials(const TlsFiles& files) {
  if (!files.enabled()) return grpc::InsecureChannelCredentials();
  RETURN_IF_ERROR(CheckFlags(files));
  ASSIGN_OR_RETURN(grpc::experimental::IdentityKeyCertPair identity, ReadIdentity(files, nullptr));
  grpc::experimental::TlsChannelCredentialsOptions options;
  // Names and dates are not checked: restarting a server does not renew its certificate.
  options.set_verify_server_certs(false);
  options.set_check_call_host(false);
  options.set_certificate_verifier(
      grpc::experimental::ExternalCertificateVerifier::Create<SameCertificate>(
          identity.certificate_chain));
  options.set_certificate_provider(
      std::make_shared<grpc::experimental::StaticDataCertificateProvider>(
          std::vector<grpc::experimental::IdentityKeyCertPair>{std::move(identity)}));
  options.watch_identity_key_cert_pairs();
  return grpc::experimental::TlsCredentials(options);
}

}  // namespace certiq::server
