// Error messages of the command, with the flag at fault and advice.
#ifndef CERTIQ_CLIENT_CPP_CLI_ERRORS_H_
#define CERTIQ_CLIENT_CPP_CLI_ERRORS_H_

#include <ostream>
#include <string>

#include "absl/status/status.h"
#include "absl/strings/string_view.h"

namespace certiq::cli {

// The code's name and the message on one line; every field at fault with its flag, and the
// advice if there is any, on lines of their own. Text from the server loses its control
// characters, which a terminal would obey.
void PrintError(const absl::Status& status, absl::string_view advice, std::ostream& err);

// Advice on an error of Quantize at `server`; empty where the details say enough.
std::string AdviceFor(const absl::Status& status, const std::string& server,
                      const std::string& request_id);

// Advice on an error of any other call.
std::string GeneralAdvice(const absl::Status& status, const std::string& server);

// `text` with control characters as spaces.
std::string Printable(absl::string_view text);

}  // namespace certiq::cli

#endif  // CERTIQ_CLIENT_CPP_CLI_ERRORS_H_
