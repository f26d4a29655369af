// `certiq jobs …`, `certiq watch`, `certiq cancel`.
#include <memory>
#include <ostream>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "base/status_macros.h"
#include "certiq/job_client.h"
#include "errors.h"
#include "flag_types.h"
#include "verb.h"

namespace certiq::cli {
namespace {

// Values as given; each verb uses some of them.
struct Flags {
  ConnectionFlags connection;
  std::string job;
  JobFilter filter;
  bool json = false;
};

std::string StateText(v1::JobState state) {
  return EnumText(v1::JobState_Name(state), "JOB_STATE_");
}

void Print(const v1::Job& job, std::ostream& out) {
  PrintLine("job", job.id(), out);
  PrintLine("state", StateText(job.state()), out);
  PrintLine("layer", absl::StrFormat("%s [%d, %d]", job.layer_name(), job.rows(), job.features()),
            out);
  PrintLine("calibration", job.calibration_id(), out);
  PrintLine("request_id", job.request_id(), out);
  PrintLine("priority", absl::StrCat(job.priority()), out);
  if (job.state() == v1::JOB_STATE_QUEUED) {
    PrintLine("queue", absl::StrCat(job.queue_position(), " ahead"), out);
  }
  if (job.state() == v1::JOB_STATE_RUNNING) {
    PrintLine("phase",
              absl::StrFormat("%s %.0f %%", EnumText(v1::Phase_Name(job.phase()), "PHASE_"),
                              100 * job.fraction()),
              out);
  }
  PrintLine("created", TimeText(job.create_time()), out);
  PrintLine("started",
            absl::StrFormat("%s, %d %s", TimeText(job.start_time()), job.starts(),
                            job.starts() == 1 ? "start" : "starts"),
            out);
  PrintLine("ended", TimeText(job.end_time()), out);
  PrintLine("deadline", TimeText(job.deadline_time()), out);
  PrintLine("expires", TimeText(job.expire_time()), out);
  if (job.state() == v1::JOB_STATE_SUCCEEDED) {
    PrintLine("error", absl::StrFormat("%.5f relative", job.relative_error()), out);
    PrintLine("damping", absl::StrFormat("lambda %.4g used", job.lambda_used()), out);
    PrintLine("result", BytesText(job.result_bytes()), out);
  }
  if (const absl::Status why = JobError(job); !why.ok()) {
    PrintLine("reason",
              absl::StrCat(absl::StatusCodeToString(why.code()), ": ", std::string(why.message())),
              out);
  }
}

absl::StatusOr<int> RunList(const JobClient& client, const Flags& flags, const Io& io) {
  ASSIGN_OR_RETURN(std::vector<v1::Job> jobs,
                   client.List(flags.filter, CallOptionsFor(io, nullptr)));
  if (flags.json) {
    v1::ListJobsResponse response;
    for (v1::Job& job : jobs) *response.add_jobs() = std::move(job);
    return PrintJson(response, io);
  }
  for (const v1::Job& job : jobs) {
    io.out << absl::StrFormat("%s  %-9s  %s  %s%s\n", Printable(job.id()), StateText(job.state()),
                              TimeText(job.create_time()), Printable(job.layer_name()),
                              job.state() == v1::JOB_STATE_SUCCEEDED
                                  ? absl::StrFormat("  error %.5f", job.relative_error())
                                  : std::string());
  }
  return kExitOk;
}

absl::StatusOr<int> RunGet(const JobClient& client, const Flags& flags, const Io& io) {
  ASSIGN_OR_RETURN(const v1::Job job, client.Get(flags.job, CallOptionsFor(io, nullptr)));
  if (flags.json) return PrintJson(job, io);
  Print(job, io.out);
  return kExitOk;
}

absl::StatusOr<int> RunDelete(const JobClient& client, const Flags& flags, const Io& io) {
  const absl::Status status = client.Delete(flags.job, CallOptionsFor(io, nullptr));
  if (!status.ok()) {
    return Fail(status, flags.connection, io,
                absl::IsFailedPrecondition(status) ? "`certiq cancel` ends it" : "");
  }
  io.out << "deleted " << Printable(flags.job) << "\n";
  return kExitOk;
}

absl::StatusOr<int> RunCancel(const JobClient& client, const Flags& flags, const Io& io) {
  ASSIGN_OR_RETURN(const v1::Job job, client.Cancel(flags.job, CallOptionsFor(io, nullptr)));
  io.out << StateText(job.state()) << "\n";
  return kExitOk;
}

absl::StatusOr<int> RunWatch(const JobClient& client, const Flags& flags, const Io& io) {
  absl::StatusOr<v1::Job> job;
  {
    ProgressPrinter progress(&io.err, io.err_is_terminal);
    job = client.Watch(
        flags.job,
        [&progress](const v1::Job& now) {
          v1::Progress shown;
          shown.set_phase(now.state() == v1::JOB_STATE_QUEUED ? v1::PHASE_QUEUE : now.phase());
          shown.set_fraction(now.fraction());
          if (!IsFinal(now.state())) progress.Show(shown);
        },
        CallOptionsFor(io, &progress));
  }
  RETURN_IF_ERROR(job.status());
  io.out << StateText(job->state()) << "\n";
  if (job->state() == v1::JOB_STATE_SUCCEEDED) return kExitOk;
  if (const absl::Status why = JobError(*job); !why.ok()) PrintError(why, "", io.err);
  return kExitFailed;
}

using Run = absl::StatusOr<int>(const JobClient&, const Flags&, const Io&);

absl::StatusOr<int> RunWithClient(Run* run, const Flags& flags, const Io& io) {
  ASSIGN_OR_RETURN(const auto client, ConnectTo<JobClient>(flags.connection, io));
  return run(*client, flags, io);
}

}  // namespace

void AddJobsVerbs(CLI::App* app, Verbs* verbs) {
  CLI::App* const noun = AddNoun(app, "jobs", "List, show and delete jobs");
  const auto flags = std::make_shared<Flags>();
  const auto add = [&](CLI::App* parent, const char* name, const char* description, bool object,
                       Run* run) {
    CLI::App* const verb = AddVerb(parent, name, description);
    if (object) AddObject(verb, "JOB", &flags->job, "The job's id");
    AddConnectionFlags(verb, &flags->connection);
    OnParsed(verb, [verb, object, flags] {
      CheckFlags(*verb, {});
      if (object) CheckFlags(*verb, {"JOB"});
      CheckConnection(*verb, flags->connection);
    });
    verbs->push_back({verb, [flags, run](const Io& io) {
                        return ExitCode(RunWithClient(run, *flags, io), flags->connection, io);
                      }});
    return verb;
  };
  const auto json = [&](CLI::App* verb) {
    AddSwitch(verb, "--json", &flags->json, "Print JSON, with the contract's field names");
  };

  CLI::App* const list = add(noun, "list", "List jobs, newest first", false, RunList);
  json(list);
  AddText(list, "--calibration", "ID", &flags->filter.calibration_id,
          "Only those that use this calibration");
  AddRepeatedFlag(
      list, "--state", "STATE",
      [flags](const std::string& text) -> std::optional<std::string> {
        for (const auto& [name, state] : Choices<v1::JobState>("JOB_STATE_")) {
          if (name != text) continue;
          flags->filter.states.push_back(state);
          return std::nullopt;
        }
        return "queued, running, succeeded, failed, cancelled or expired";
      },
      "Only jobs in this state; may be given several times");
  json(add(noun, "get", "Show one job", true, RunGet));
  add(noun, "delete", "Delete a job that has ended, with its result", true, RunDelete);
  add(app, "watch", "Follow a job to its end; exit code 0 only if it succeeded", true, RunWatch);
  add(app, "cancel", "End a job; prints its state then", true, RunCancel);
}

}  // namespace certiq::cli
