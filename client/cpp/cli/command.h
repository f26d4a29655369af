// The certiq command without main(): verbs, streams and exit codes.
#ifndef CERTIQ_CLIENT_CPP_CLI_COMMAND_H_
#define CERTIQ_CLIENT_CPP_CLI_COMMAND_H_

#include <ostream>
#include <stop_token>
#include <string>
#include <vector>

#include "certiq/client.h"

namespace CLI {
class App;
}  // namespace CLI

namespace certiq::cli {

inline constexpr int kExitOk = 0;
// The server rejected the request or failed, or an input file cannot be used.
inline constexpr int kExitFailed = 1;
// An unknown flag, a value that cannot be read, a required flag that is missing.
inline constexpr int kExitUsage = 2;
// Ctrl-C.
inline constexpr int kExitInterrupted = 130;

// Streams and interrupt of a verb. The streams must outlive it.
struct Io {
  std::ostream& out;
  std::ostream& err;
  // Whether progress may be a bar that redraws itself.
  bool err_is_terminal = false;
  // Stopped when the user interrupts.
  std::stop_token interrupt;
  // Options of clients, for tests; the flags set the address.
  ClientOptions client = {};
};

// Runs one command line, without the program's name. Never throws.
int RunCommand(const std::vector<std::string>& arguments, const Io& io);

int RunVersion(const Io& io);

// "0.1.0".
std::string Version();

}  // namespace certiq::cli

#endif  // CERTIQ_CLIENT_CPP_CLI_COMMAND_H_
