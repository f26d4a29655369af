// Errors for people.
#ifndef CERTIQ_CLIENT_CPP_CLI_ERRORS_H_
#define CERTIQ_CLIENT_CPP_CLI_ERRORS_H_

#include <ostream>
#include <string>

#include "absl/status/status.h"
#include "absl/strings/string_view.h"

namespace certiq::cli {

// The code's name and the message on one line; every field at fault with its flag, and the
// advice if there is any, on lines of their own. Text of others loses its control characters: a
// terminal would obey them.
void PrintError(const absl::Status& status, absl::string_view advice, std::ostream& err);

// What to do about an error of Quantize at `server`; empty where the details say it.
std::string AdviceFor(const absl::Status& status, const std::string& server,
                      const std::string& request_id);

// The same for the other calls.
std::string GeneralAdvice(const absl::Status& status, const std::string& server);

// `text` with control characters as spaces.
std::string Printable(absl::string_view text);

}  // namespace certiq::cli

#endif  // CERTIQ_CLIENT_CPP_CLI_ERRORS_H_
