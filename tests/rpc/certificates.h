// Certificates and files for tests of TLS and tokens.

#ifndef CERTIQ_TESTS_RPC_CERTIFICATES_H_
#define CERTIQ_TESTS_RPC_CERTIFICATES_H_

#include <mutex>
#include <string>
#include <vector>

#include "rpc/transport/file.h"

namespace certiq::testing {

// PEM.
struct Identity {
  std::string cert;
  std::string key;
};

// Signs itself.
Identity MakeAuthority(const std::string& name);

// Good for localhost and 127.0.0.1, as server and as client, from yesterday until so many days from
// now.
Identity MakeIdentity(const Identity& authority, const std::string& name, int valid_days = 1);

// A folder of its own that goes with the object.
class Folder {
 public:
  Folder();
  ~Folder();
  Folder(const Folder&) = delete;
  Folder& operator=(const Folder&) = delete;

  std::string Path(const std::string& name) const { return path_ + "/" + name; }
  // Replaces the file as a whole, readable by its owner only; its path.
  std::string Write(const std::string& name, const std::string& text) const;

 private:
  std::string path_;
};

// Keeps what it was warned of.
class Warnings {
 public:
  server::Warn Sink();
  std::vector<std::string> all();

 private:
  std::mutex mu_;
  std::vector<std::string> all_;  // guarded by mu_
};

}  // namespace certiq::testing

#endif  // CERTIQ_TESTS_RPC_CERTIFICATES_H_
