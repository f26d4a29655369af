#include <ostream>

#include "command.h"

namespace certiq::cli {

std::string Version() { return CERTIQ_VERSION; }

int RunVersion(const Io& io) {
  io.out << Version() << "\n";
  return kExitOk;
}

}  // namespace certiq::cli
