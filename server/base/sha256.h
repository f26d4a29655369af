// SHA-256 of bytes that come in pieces.

#ifndef CERTIQ_BASE_SHA256_H_
#define CERTIQ_BASE_SHA256_H_

#include <memory>
#include <string>

#include "absl/strings/string_view.h"

struct evp_md_ctx_st;

namespace certiq::base {

// Not thread-safe.
class Sha256 {
 public:
  Sha256();
  ~Sha256();
  Sha256(const Sha256&) = delete;
  Sha256& operator=(const Sha256&) = delete;

  void Update(absl::string_view bytes);
  // Lowercase hex of what came; the digest is spent. Empty if the library failed.
  std::string Finish();

 private:
  struct Free {
    void operator()(evp_md_ctx_st* context) const;
  };
  std::unique_ptr<evp_md_ctx_st, Free> context_;
  bool ok_;
};

}  // namespace certiq::base

#endif  // CERTIQ_BASE_SHA256_H_
