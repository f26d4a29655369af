#include "certificates.h"

#include <gtest/gtest.h>
#include <openssl/bio.h>
#include <openssl/evp.h>
#include <openssl/pem.h>
#include <openssl/x509v3.h>

#include <atomic>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <memory>
#include <string>

namespace certiq::testing {
namespace {

constexpr long kDay = 86400;

template <typename T, void (*kFree)(T*)>
struct Free {
  void operator()(T* object) const { kFree(object); }
};
using Certificate = std::unique_ptr<X509, Free<X509, X509_free>>;
using Key = std::unique_ptr<EVP_PKEY, Free<EVP_PKEY, EVP_PKEY_free>>;
using Bio = std::unique_ptr<BIO, Free<BIO, BIO_free_all>>;

std::string TextOf(const Bio& bio) {
  char* data = nullptr;
  const long size = BIO_get_mem_data(bio.get(), &data);
  return {data, static_cast<size_t>(size)};
}

void Extend(X509* certificate, int nid, const char* value) {
  X509_EXTENSION* const extension = X509V3_EXT_conf_nid(nullptr, nullptr, nid, value);
  EXPECT_EQ(X509_add_ext(certificate, extension, -1), 1);
  X509_EXTENSION_free(extension);
}

Identity Make(const Identity* authority, const std::string& name, int valid_days) {
  static std::atomic<int> serial{1};
  const Key key(EVP_EC_gen("P-256"));
  const Certificate certificate(X509_new());
  X509_set_version(certificate.get(), 2);
  ASN1_INTEGER_set(X509_get_serialNumber(certificate.get()), serial++);
  X509_gmtime_adj(X509_getm_notBefore(certificate.get()), -2 * kDay);
  X509_gmtime_adj(X509_getm_notAfter(certificate.get()), valid_days * kDay);
  X509_set_pubkey(certificate.get(), key.get());
  X509_NAME* const subject = X509_get_subject_name(certificate.get());
  X509_NAME_add_entry_by_txt(subject, "CN", MBSTRING_ASC,
                             reinterpret_cast<const unsigned char*>(name.c_str()), -1, -1, 0);
  if (authority == nullptr) {
    Extend(certificate.get(), NID_basic_constraints, "critical,CA:TRUE");
    X509_set_issuer_name(certificate.get(), subject);
    EXPECT_GT(X509_sign(certificate.get(), key.get(), EVP_sha256()), 0);
  } else {
    Extend(certificate.get(), NID_subject_alt_name, "DNS:localhost,IP:127.0.0.1");
    const Bio cert_text(BIO_new_mem_buf(authority->cert.data(), -1));
    const Bio key_text(BIO_new_mem_buf(authority->key.data(), -1));
    const Certificate issuer(PEM_read_bio_X509(cert_text.get(), nullptr, nullptr, nullptr));
    const Key signer(PEM_read_bio_PrivateKey(key_text.get(), nullptr, nullptr, nullptr));
    X509_set_issuer_name(certificate.get(), X509_get_subject_name(issuer.get()));
    EXPECT_GT(X509_sign(certificate.get(), signer.get(), EVP_sha256()), 0);
  }
  const Bio cert_out(BIO_new(BIO_s_mem()));
  const Bio key_out(BIO_new(BIO_s_mem()));
  EXPECT_EQ(PEM_write_bio_X509(cert_out.get(), certificate.get()), 1);
  EXPECT_EQ(
      PEM_write_bio_PrivateKey(key_out.get(), key.get(), nullptr, nullptr, 0, nullptr, nullptr), 1);
  return {TextOf(cert_out), TextOf(key_out)};
}

}  // namespace

Identity MakeAuthority(const std::string& name) { return Make(nullptr, name, 30); }

Identity MakeIdentity(const Identity& authority, const std::string& name, int valid_days) {
  return Make(&authority, name, valid_days);
}

Folder::Folder() : path_(::testing::TempDir() + "certiq-XXXXXX") {
  EXPECT_NE(mkdtemp(path_.data()), nullptr);
}

Folder::~Folder() {
  std::error_code ignored;
  std::filesystem::remove_all(path_, ignored);
}

std::string Folder::Write(const std::string& name, const std::string& text) const {
  std::string path = Path(name);
  std::ofstream(path + ".new", std::ios::binary) << text;
  std::filesystem::permissions(
      path + ".new", std::filesystem::perms::owner_read | std::filesystem::perms::owner_write);
  std::filesystem::rename(path + ".new", path);
  return path;
}

server::Warn Warnings::Sink() {
  return [this](const std::string& message) {
    const std::lock_guard lock(mu_);
    all_.push_back(message);
  };
}

std::vector<std::string> Warnings::all() {
  const std::lock_guard lock(mu_);
  return all_;
}

}  // namespace certiq::testing
