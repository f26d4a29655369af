#include "base/sha256.h"

#include <openssl/evp.h>

#include "absl/strings/escaping.h"

namespace certiq::base {

void Sha256::Free::operator()(evp_md_ctx_st* context) const { EVP_MD_CTX_free(context); }

Sha256::Sha256()
    : context_(EVP_MD_CTX_new()),
      ok_(context_ != nullptr && EVP_DigestInit_ex(context_.get(), EVP_sha256(), nullptr) == 1) {}

Sha256::~Sha256() = default;

void Sha256::Update(absl::string_view bytes) {
  ok_ = ok_ && EVP_DigestUpdate(context_.get(), bytes.data(), bytes.size()) == 1;
}

std::optional<Sha256Digest> Sha256::FinishDigest() {
  Sha256Digest digest;
  ok_ = ok_ && EVP_DigestFinal_ex(context_.get(), digest.data(), nullptr) == 1;
  if (!ok_) return std::nullopt;
  return digest;
}

std::string Sha256::Finish() {
  const std::optional<Sha256Digest> digest = FinishDigest();
  if (!digest.has_value()) return "";
  // NOLINTNEXTLINE(bugprone-*): bytes are bytes.
  return absl::BytesToHexString({reinterpret_cast<const char*>(digest->data()), digest->size()});
}

std::optional<Sha256Digest> Sha256Of(absl::string_view bytes) {
  Sha256 digest;
  digest.Update(bytes);
  return digest.FinishDigest();
}

}  // namespace certiq::base
