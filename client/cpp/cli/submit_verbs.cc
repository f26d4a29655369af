// `certiq submit` and `certiq result`.
#include <memory>
#include <ostream>
#include <utility>

#include "base/status_macros.h"
#include "certiq/job_client.h"
#include "errors.h"
#include "flag_types.h"
#include "layer_files.h"
#include "spec_flags.h"
#include "summary.h"
#include "verb.h"

namespace certiq::cli {
namespace {

// Values as given.
struct SubmitFlags : WeightFlags {
  ConnectionFlags connection;
  std::string calibration;
  // The weights and ids are filled in later.
  JobRequest request;
};

struct ResultFlags : OutputFlags {
  ConnectionFlags connection;
  std::string job;
};

absl::StatusOr<int> RunSubmit(const SubmitFlags& flags, const Io& io) {
  ASSIGN_OR_RETURN(const OpenWeight weights, OpenWeightFile(flags));
  ASSIGN_OR_RETURN(const v1::Calibration calibration,
                   FindFinalized(flags.connection, io, flags.calibration));
  ASSIGN_OR_RETURN(const auto client, ConnectTo<JobClient>(flags.connection, io));
  JobRequest request = flags.request;
  request.layer_name = flags.weight;
  request.weight = weights.weight;
  request.calibration_id = calibration.id();
  absl::StatusOr<v1::Job> job;
  {
    ProgressPrinter progress(&io.err, io.err_is_terminal);
    job = client->Submit(request, CallOptionsFor(io, &progress));
  }
  RETURN_IF_ERROR(job.status());
  io.out << Printable(job->id()) << "\n";
  return kExitOk;
}

absl::StatusOr<int> RunResult(const ResultFlags& flags, const Io& io) {
  RETURN_IF_ERROR(CheckOutputs(flags));
  ASSIGN_OR_RETURN(const auto client, ConnectTo<JobClient>(flags.connection, io));
  ASSIGN_OR_RETURN(const v1::Job job, client->Get(flags.job, CallOptionsFor(io, nullptr)));
  if (!IsFinal(job.state())) {
    return Fail(absl::FailedPreconditionError("the job has not ended"), flags.connection, io,
                "`certiq watch` waits for it");
  }
  const absl::StatusOr<QuantizeResult> result =
      client->ReadResult(flags.job, CallOptionsFor(io, nullptr));
  if (!result.ok()) {
    return Fail(
        result.status(), flags.connection, io,
        absl::IsFailedPrecondition(result.status()) ? "`certiq jobs get` says how it ended" : "");
  }
  RETURN_IF_ERROR(WriteOutputs(flags, job.layer_name(), *result, io.interrupt));
  // The job does not say which type the weights had.
  io.out << SummaryText(job.layer_name(), v1::DATA_TYPE_UNSPECIFIED, result->certificate);
  PrintWritten(flags, io.out);
  return kExitOk;
}

}  // namespace

void AddSubmitVerb(CLI::App* app, Verbs* verbs) {
  const auto flags = std::make_shared<SubmitFlags>();
  CLI::App* const verb = AddVerb(app, "submit", "Queue a layer as a job and print the job's id");
  AddConnectionFlags(verb, &flags->connection);
  AddWeightFlags(verb, flags.get());
  AddText(verb, "--calibration", "ID|LABEL", &flags->calibration,
          "A finalized calibration (required)");
  AddNumber<int32_t>(
      verb, "--priority", "P", [flags](int32_t value) { flags->request.priority = value; },
      "Higher goes first, -100 to 100 (default 0)");
  AddDuration(
      verb, "--deadline", [flags](absl::Duration value) { flags->request.deadline = value; },
      "It expires where it has not ended so long after its creation (default: never)");
  AddDuration(
      verb, "--ttl", [flags](absl::Duration value) { flags->request.ttl = value; },
      "How long it and its result are kept after its end (default 24h)");
  AddText(verb, "--request_id", "ID", &flags->request.request_id,
          "The same id and content again give the same job (default: a new one)");
  AddSpecFlags(verb, &flags->request.spec);
  OnParsed(verb, [verb, flags] {
    CheckFlags(*verb, {});
    CheckConnection(*verb, flags->connection);
    CheckFlags(*verb, {"--weights", "--weight", "--calibration"});
    CheckSpecFlags(*verb);
  });
  verbs->push_back({verb, [flags](const Io& io) {
                      return ExitCode(RunSubmit(*flags, io), flags->connection, io);
                    }});
}

void AddResultVerb(CLI::App* app, Verbs* verbs) {
  const auto flags = std::make_shared<ResultFlags>();
  CLI::App* const verb = AddVerb(app, "result", "Fetch the result of a job that succeeded");
  AddObject(verb, "JOB", &flags->job, "The job's id");
  AddConnectionFlags(verb, &flags->connection);
  AddOutputFlags(verb, flags.get());
  OnParsed(verb, [verb, flags] {
    CheckFlags(*verb, {"JOB"});
    CheckConnection(*verb, flags->connection);
    CheckOutputFlags(*flags);
  });
  verbs->push_back({verb, [flags](const Io& io) {
                      return ExitCode(RunResult(*flags, io), flags->connection, io);
                    }});
}

}  // namespace certiq::cli
