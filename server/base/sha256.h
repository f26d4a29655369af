// SHA-256 digests.

#ifndef CERTIQ_BASE_SHA256_H_
#define CERTIQ_BASE_SHA256_H_

#include <array>
#include <memory>
#include <optional>
#include <string>

#include "absl/strings/string_view.h"

struct evp_md_ctx_st;

namespace certiq::base {

using Sha256Digest = std::array<unsigned char, 32>;

// Digest of bytes that come in pieces. Not thread-safe.
class Sha256 {
 public:
  Sha256();
  ~Sha256();
  Sha256(const Sha256&) = delete;
  Sha256& operator=(const Sha256&) = delete;

  void Update(absl::string_view bytes);

  // Either of these ends the digest; the object is spent.
  // Absent if OpenSSL failed.
  std::optional<Sha256Digest> FinishDigest();
  // Lowercase hex; empty if OpenSSL failed.
  std::string Finish();

 private:
  struct Free {
    void operator()(evp_md_ctx_st* context) const;
  };
  std::unique_ptr<evp_md_ctx_st, Free> context_;
  bool ok_;
};

// Digest of bytes at hand, absent if OpenSSL failed.
std::optional<Sha256Digest> Sha256Of(absl::string_view bytes);

}  // namespace certiq::base

#endif  // CERTIQ_BASE_SHA256_H_
