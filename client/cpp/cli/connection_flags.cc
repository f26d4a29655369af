#include "connection_flags.h"

#include <cstdlib>
#include <fstream>
#include <iterator>
#include <optional>
#include <utility>

#include "absl/status/status.h"
#include "absl/strings/ascii.h"
#include "absl/strings/str_cat.h"
#include "base/status_macros.h"
#include "flag_types.h"

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
  AddFlag(
      verb, "--server", "HOST:PORT",
      [flags](const std::string& text) -> std::optional<std::string> {
        flags->server = text;
        if (!CheckAddress(text).ok()) return "HOST:PORT";
        return std::nullopt;
      },
      "The server (required); in clear text without one of the --tls flags");
  AddSwitch(verb, "--tls", &flags->tls,
            "Speak TLS; the system's authorities are trusted unless --tls_ca is given");
  AddText(verb, "--tls_ca", "FILE", &flags->tls_ca,
          "Authorities to trust instead of the system's, PEM; turns TLS on");
  AddText(verb, "--tls_cert", "FILE", &flags->tls_cert,
          "Certificate to show to the server, PEM; turns TLS on");
  AddText(verb, "--tls_key", "FILE", &flags->tls_key, "Its key, PEM");
  AddText(verb, "--tls_server_name", "NAME", &flags->tls_server_name,
          "Name the server's certificate must be for, where it is not that of --server");
  AddText(verb, "--token_file", "FILE", &flags->token_file,
          "File with the token that lets you in; without it CERTIQ_TOKEN, if set");
  AddSwitch(verb, "--allow_cleartext", &flags->allow_cleartext,
            "Send the token in clear text to another machine");
}

void CheckConnection(const CLI::App& verb, const ConnectionFlags& flags) {
  if (!IsGiven(verb, "--server")) ThrowMissing("--server");
  if (flags.tls_cert.empty() != flags.tls_key.empty()) {
    ThrowUsageError("--tls_cert and --tls_key", "expected both or none");
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
    ASSIGN_OR_RETURN(base.token, ReadToken(flags.token_file));
    // NOLINTNEXTLINE(concurrency-mt-unsafe): nothing here changes the environment.
  } else if (const char* const token = std::getenv("CERTIQ_TOKEN"); token != nullptr) {
    base.token = std::string(absl::StripAsciiWhitespace(token));
  }
  return base;
}

}  // namespace certiq::cli
