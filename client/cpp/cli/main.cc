// The certiq command line.
#include <unistd.h>

#include <iostream>
#include <string>
#include <vector>

#include "command.h"
#include "signals.h"

int main(int argc, char** argv) {
  // The watcher comes first, because threads started later inherit its signal mask.
  const certiq::cli::InterruptWatcher interrupts;
  const std::vector<std::string> arguments(argv + 1, argv + argc);
  const certiq::cli::Io io{.out = std::cout,
                           .err = std::cerr,
                           .err_is_terminal = isatty(STDERR_FILENO) == 1,
                           .interrupt = interrupts.token()};
  const int code = certiq::cli::RunCommand(arguments, io);
  std::cout.flush();
  return code == certiq::cli::kExitInterrupted ? interrupts.exit_code() : code;
}
