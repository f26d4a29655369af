// Verbs of calibrations and jobs, and the functions that verbs with a server share.
#ifndef CERTIQ_CLIENT_CPP_CLI_VERB_H_
#define CERTIQ_CLIENT_CPP_CLI_VERB_H_

#include <functional>
#include <memory>
#include <ostream>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "base/status_macros.h"
#include "certiq/calibration_client.h"
#include "certiq/client.h"
#include "command.h"
#include "connection_flags.h"
#include "google/protobuf/message.h"
#include "google/protobuf/timestamp.pb.h"
#include "progress.h"

namespace certiq::cli {

// A verb, or a verb of a noun ("calibrations list").
struct Verb {
  CLI::App* app;
  // Runs the verb after a parse that chose it; returns the exit code.
  std::function<int(const Io&)> run;
};
using Verbs = std::vector<Verb>;

void AddCalibrationsVerbs(CLI::App* app, Verbs* verbs);
void AddStatisticsVerbs(CLI::App* app, Verbs* verbs);
void AddSubmitVerb(CLI::App* app, Verbs* verbs);
void AddJobsVerbs(CLI::App* app, Verbs* verbs);
void AddResultVerb(CLI::App* app, Verbs* verbs);

// A client of the service by these flags; all other options are io.client's. Errors as OptionsFor
// and Service::Create.
template <typename ServiceClient>
absl::StatusOr<std::unique_ptr<ServiceClient>> ConnectTo(const ConnectionFlags& flags,
                                                         const Io& io) {
  ASSIGN_OR_RETURN(ClientOptions options, OptionsFor(flags, io.client));
  return ServiceClient::Create(std::move(options));
}

// Options of a call that Ctrl-C cancels and whose progress `progress`, unless null, shows; it must
// outlive the call.
CallOptions CallOptionsFor(const Io& io, ProgressPrinter* progress);

// Prints the error, the advice given or, where it is empty, a general one. Returns the exit code.
int Fail(const absl::Status& status, const ConnectionFlags& flags, const Io& io,
         absl::string_view advice = "");

// The exit code that a verb returned or, for an error, that of Fail, which prints it.
int ExitCode(const absl::StatusOr<int>& code, const ConnectionFlags& flags, const Io& io);

// The calibration of this id or label, finalized. FAILED_PRECONDITION, which says how to finalize
// it, where it is still open; errors of CalibrationClient::Find.
absl::StatusOr<v1::Calibration> FindFinalized(const ConnectionFlags& flags, const Io& io,
                                              const std::string& id_or_label);

// The message as JSON on io.out. Returns the exit code.
int PrintJson(const google::protobuf::Message& message, const Io& io);

// "FINALIZED" for v1::CALIBRATION_STATE_FINALIZED: the value's name without `prefix`.
std::string EnumText(const std::string& name, absl::string_view prefix);

// In UTC; "-" where it is not set.
std::string TimeText(const google::protobuf::Timestamp& time);

// A label and a value in the columns of the summaries.
void PrintLine(absl::string_view label, const std::string& value, std::ostream& out);

}  // namespace certiq::cli

#endif  // CERTIQ_CLIENT_CPP_CLI_VERB_H_
