// Connection flags of the verbs that call a server: address, TLS, token.
#ifndef CERTIQ_CLIENT_CPP_CLI_CONNECTION_FLAGS_H_
#define CERTIQ_CLIENT_CPP_CLI_CONNECTION_FLAGS_H_

#include <string>

#include "absl/status/statusor.h"
#include "certiq/client.h"

namespace CLI {
class App;
}  // namespace CLI

namespace certiq::cli {

// Values as given; empty where a flag was not.
struct ConnectionFlags {
  std::string server;
  // Any of the four below turns it on too.
  bool tls = false;
  std::string tls_ca;
  std::string tls_cert;
  std::string tls_key;
  std::string tls_server_name;
  // The token itself is no flag: everyone on the machine can read command lines.
  std::string token_file;
  bool allow_cleartext = false;
};

// Adds the flags; parsing fills `*flags`, which must outlive the app.
void AddConnectionFlags(CLI::App* verb, ConnectionFlags* flags);

// Throws CLI::ParseError where flags are missing or contradict each other; for a verb's callback,
// after unknown flags were named.
void CheckConnection(const CLI::App& verb, const ConnectionFlags& flags);

// `base` with what the flags say, the token read from --token_file or, without it, taken from
// CERTIQ_TOKEN. Errors name the file and never show the token.
absl::StatusOr<ClientOptions> OptionsFor(const ConnectionFlags& flags, ClientOptions base);

}  // namespace certiq::cli

#endif  // CERTIQ_CLIENT_CPP_CLI_CONNECTION_FLAGS_H_
