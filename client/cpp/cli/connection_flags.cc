#include "connection_flags.h"

#include <cstdlib>
#include <fstream>
#include <iterator>
#include <utility>

#include "CLI/CLI.hpp"
#include "absl/status/status.h"
#include "absl/strings/ascii.h"
#include "absl/strings/str_cat.h"
#include "command.h"

namespace certiq::cli {
namespace {

constexpr size_t kMaxTokenFileBytes = 64 << 10;

bool WantsTls(const ConnectionFlags& flags) {
  return flags.tls || !flags.tls_ca.empty() || !flags.tls_cert.empty() || !flags.tls_key.empty() ||
         !flags.tls_server_name.empty();
}

absl::StatusOr<std::string> ReadToken(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  std::string text(kMaxTokenFileBytes, '\0');
  file.read(text.data(), static_cast<std::streamsize>(text.size()));
  text.resize(static_cast<size_t>(file.gcount()));
  if (!file.eof()) {
    return absl::InvalidArgumentError(absl::StrCat("--token_file: cannot read ", path));
  }
  absl::StripAsciiWhitespace(&text);
  if (text.empty()) {
    return absl::InvalidArgumentError(
        absl::StrCat("--token_file: expected a token in ", path, ", found none"));
  }
  return text;
}

}  // namespace

void AddConnectionFlags(CLI::App* verb, ConnectionFlags* flags) {
  verb->add_option_function<std::string>(
          "--server",
          [flags](const std::string& text) {
            flags->server = text;
            if (CheckAddress(text).ok()) return;
            throw CLI::ValidationError("--server",
                                       absl::StrCat("expected HOST:PORT, got \"", text, "\""));
          },
          "The server (required); in clear text without one of the --tls flags")
      ->type_name("HOST:PORT");
  verb->add_flag("--tls", flags->tls,
                 "Speak TLS; the system's authorities are trusted unless --tls_ca is given");
  verb->add_option("--tls_ca", flags->tls_ca,
                   "Authorities to trust instead of the system's, PEM; turns TLS on")
      ->type_name("FILE");
  verb->add_option("--tls_cert", flags->tls_cert,
                   "Certificate to show to the server, PEM; turns TLS on")
      ->type_name("FILE");
  verb->add_option("--tls_key", flags->tls_key, "Its key, PEM")->type_name("FILE");
  verb->add_option("--tls_server_name", flags->tls_server_name,
                   "Name the server's certificate must be for, where it is not that of --server")
      ->type_name("NAME");
  verb->add_option("--token_file", flags->token_file,
                   "File with the token that lets you in; without it CERTIQ_TOKEN, if set")
      ->type_name("FILE");
  verb->add_flag("--allow_cleartext", flags->allow_cleartext,
                 "Send the token in clear text to another machine");
}

void CheckConnection(const CLI::App& verb, const ConnectionFlags& flags) {
  if (verb.count("--server") == 0) throw CLI::RequiredError("--server");
  if (flags.tls_cert.empty() != flags.tls_key.empty()) {
    throw CLI::ValidationError("--tls_cert and --tls_key", "expected both or none");
  }
}

absl::StatusOr<ClientOptions> OptionsFor(const ConnectionFlags& flags, ClientOptions base) {
  base.address = flags.server;
  base.allow_cleartext = flags.allow_cleartext;
  if (WantsTls(flags)) {
    base.tls = TlsOptions{.ca_file = flags.tls_ca,
                          .cert_file = flags.tls_cert,
                          .key_file = flags.tls_key,
                          .server_name = flags.tls_server_name};
  }
  if (!flags.token_file.empty()) {
    absl::StatusOr<std::string> token = ReadToken(flags.token_file);
    if (!token.ok()) return token.status();
    base.token = *std::move(token);
    // NOLINTNEXTLINE(concurrency-mt-unsafe): nothing here changes the environment.
  } else if (const char* const token = std::getenv("CERTIQ_TOKEN"); token != nullptr) {
    base.token = std::string(absl::StripAsciiWhitespace(token));
  }
  return base;
}

absl::StatusOr<std::unique_ptr<Client>> Connect(const ConnectionFlags& flags, const Io& io) {
  absl::StatusOr<ClientOptions> options = OptionsFor(flags, io.client);
  if (!options.ok()) return options.status();
  return Client::Create(*std::move(options));
}

}  // namespace certiq::cli
