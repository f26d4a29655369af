#include <array>
#include <ostream>
#include <utility>

#include "CLI/CLI.hpp"
#include "command.h"

namespace certiq::cli {
namespace {

constexpr std::array<std::pair<const char*, const char*>, 8> kLaterVerbs = {{
    {"calibrations", "Create, list and finalize calibrations"},
    {"jobs", "List jobs"},
    {"submit", "Queue a job"},
    {"watch", "Follow a job"},
    {"result", "Fetch the result of a job"},
    {"cancel", "Cancel a job"},
    {"import", "Merge ready-made statistics into a calibration"},
    {"export", "Save the statistics of a calibration"},
}};

}  // namespace

void AddLaterVerbs(CLI::App* app) {
  for (const auto& [name, description] : kLaterVerbs) {
    app->add_subcommand(name, std::string(description) + " (not there yet)")->allow_extras();
  }
}

int RunLaterVerb(const std::string& verb, const Io& io) {
  io.err << "certiq " << verb << ": not there yet in version " << Version() << "\n";
  return kExitFailed;
}

}  // namespace certiq::cli
