#include "command.h"

#include <algorithm>

#include "CLI/CLI.hpp"
#include "quantize_flags.h"
#include "quantize_verb.h"
#include "readers_help.h"
#include "verb.h"
#include "verify_verb.h"

namespace certiq::cli {
namespace {

int Run(const std::vector<std::string>& arguments, const Io& io) {
  CLI::App app("Post-training quantization as a service, with a certificate.", "certiq");
  app.require_subcommand(0, 1);
  app.set_version_flag("--version", Version());

  QuantizeFlags flags;
  CLI::App* const quantize = AddQuantizeVerb(&app, &flags);
  VerifyFlags verify_flags;
  CLI::App* const verify = AddVerifyVerb(&app, &verify_flags);
  app.add_subcommand("version", "Print the version");
  Verbs verbs;
  AddCalibrationsVerbs(&app, &verbs);
  AddStatisticsVerbs(&app, &verbs);
  AddSubmitVerb(&app, &verbs);
  AddJobsVerbs(&app, &verbs);
  AddResultVerb(&app, &verbs);
  // Set after the verbs, which would inherit it.
  app.allow_extras();
  app.footer(ReadersText());
  try {
    // CLI11 takes the arguments from the back.
    app.parse(std::vector<std::string>(arguments.rbegin(), arguments.rend()));
    if (!app.remaining().empty()) throw CLI::ExtrasError(app.get_name(), app.remaining());
    if (app.get_subcommands().empty()) throw CLI::RequiredError("A verb");
  } catch (const CLI::ParseError& error) {
    return app.exit(error, io.out, io.err) == 0 ? kExitOk : kExitUsage;
  }
  if (*quantize) return RunQuantize(flags, io);
  if (*verify) return RunVerify(verify_flags, io);
  for (const Verb& verb : verbs) {
    if (*verb.app) return verb.run(io);
  }
  return RunVersion(io);
}

}  // namespace

int RunCommand(const std::vector<std::string>& arguments, const Io& io) {
  // CLI11 and the standard library may throw; a defect should still end in an exit code.
  try {
    return Run(arguments, io);
  } catch (const std::exception& error) {
    io.err << "certiq: " << error.what() << "\n";
    return kExitFailed;
  }
}

}  // namespace certiq::cli
