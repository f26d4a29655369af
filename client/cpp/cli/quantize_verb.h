// `certiq quantize`: files in, one call, files and a summary out.
#ifndef CERTIQ_CLIENT_CPP_CLI_QUANTIZE_VERB_H_
#define CERTIQ_CLIENT_CPP_CLI_QUANTIZE_VERB_H_

#include "command.h"
#include "quantize_flags.h"

namespace certiq::cli {

// Returns the exit code. The output files appear complete, both or none unless the second rename
// itself fails, and only after success.
int RunQuantize(const QuantizeFlags& flags, const Io& io);

}  // namespace certiq::cli

#endif  // CERTIQ_CLIENT_CPP_CLI_QUANTIZE_VERB_H_
