// Who loads which format, for the help of the command.
#ifndef CERTIQ_CLIENT_CPP_CLI_READERS_HELP_H_
#define CERTIQ_CLIENT_CPP_CLI_READERS_HELP_H_

#include <string>

namespace certiq::cli {

// The contract's table (readers.csv) as text: formats, and below them a line a reader with its
// releases, what of the format it loads, and the day that was looked up.
std::string ReadersText();

}  // namespace certiq::cli

#endif  // CERTIQ_CLIENT_CPP_CLI_READERS_HELP_H_
