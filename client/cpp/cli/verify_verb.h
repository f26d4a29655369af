// `certiq verify`: flags and run of the check of a report against the layer's files.
#ifndef CERTIQ_CLIENT_CPP_CLI_VERIFY_VERB_H_
#define CERTIQ_CLIENT_CPP_CLI_VERIFY_VERB_H_

#include <string>

#include "command.h"

namespace certiq::cli {

struct VerifyFlags {
  std::string weights_file;
  std::string weight;
  std::string activations_file;
  std::string x;
  std::string x_quantized;
  std::string stream;
  std::string result_file;
  std::string report_file;
};

// Adds the verb with its flags; parsing fills `*flags`, which must outlive the app.
CLI::App* AddVerifyVerb(CLI::App* app, VerifyFlags* flags);

// A line a number, then the verdict. Returns kExitOk where everything that can be checked holds,
// kExitFailed where something is wrong or a file does not serve.
int RunVerify(const VerifyFlags& flags, const Io& io);

}  // namespace certiq::cli

#endif  // CERTIQ_CLIENT_CPP_CLI_VERIFY_VERB_H_
