// `certiq calibrations …`.
#include <memory>
#include <optional>
#include <ostream>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "absl/strings/str_join.h"
#include "base/status_macros.h"
#include "certiq/calibration_client.h"
#include "certiq/durations.h"
#include "errors.h"
#include "flag_types.h"
#include "layer_files.h"
#include "verb.h"

namespace certiq::cli {
namespace {

// Values as given; each verb uses some of them.
struct Flags : ActivationFlags {
  ConnectionFlags connection;
  std::string calibration;
  std::string stream = "0";
  bool json = false;
  // Used by list.
  std::string label;
  // Used by create.
  v1::CreateCalibrationRequest request;
  // Used by finalize.
  FinalizeRequest finalize;
};

std::string Summary(const v1::Calibration& calibration) {
  return EnumText(v1::CalibrationState_Name(calibration.state()), "CALIBRATION_STATE_");
}

void Print(const v1::Calibration& calibration, std::ostream& out) {
  PrintLine("calibration", calibration.id(), out);
  PrintLine("state", Summary(calibration), out);
  PrintLine("kind", EnumText(v1::CalibrationKind_Name(calibration.kind()), "CALIBRATION_KIND_"),
            out);
  PrintLine("features", absl::StrCat(calibration.features()), out);
  PrintLine("labels", absl::StrJoin(calibration.labels(), ", "), out);
  PrintLine("tokens",
            absl::StrFormat("%d to fit, %d held out", calibration.tokens(),
                            calibration.held_out_tokens()),
            out);
  PrintLine("held out", absl::StrFormat("%g of the rows", calibration.held_out_fraction()), out);
  PrintLine("memory", BytesText(calibration.bytes()), out);
  PrintLine("created", TimeText(calibration.create_time()), out);
  PrintLine("finalized", TimeText(calibration.finalize_time()), out);
  PrintLine("expires", TimeText(calibration.expire_time()), out);
  PrintLine("jobs", absl::StrCat(calibration.jobs()), out);
  if (!calibration.sums_sha256().empty()) {
    PrintLine("sums_sha256", calibration.sums_sha256(), out);
  }
  for (const v1::StreamProgress& stream : calibration.streams()) {
    PrintLine(
        "stream",
        absl::StrFormat("%s: %d tokens, %d chunks, %d of them durable%s%s", stream.stream_id(),
                        stream.tokens(), stream.received(), stream.durable(),
                        stream.imported() ? ", imported" : "", stream.live() ? ", live" : ""),
        out);
  }
}

int PrintOne(const v1::Calibration& calibration, const Flags& flags, const Io& io) {
  if (flags.json) return PrintJson(calibration, io);
  Print(calibration, io.out);
  return kExitOk;
}

absl::StatusOr<v1::StreamProgress> Accumulate(const CalibrationClient& client,
                                              const std::string& id, const Flags& flags,
                                              const OpenActivations& activations, const Io& io) {
  ProgressPrinter progress(&io.err, io.err_is_terminal);
  return client.Accumulate({.calibration_id = id, .stream_id = flags.stream}, activations.x,
                           activations.x_quantized, CallOptionsFor(io, &progress));
}

absl::StatusOr<int> RunCreate(const Flags& flags, const Io& io) {
  v1::CreateCalibrationRequest request = flags.request;
  std::optional<OpenActivations> activations;
  if (!flags.activations_file.empty()) {
    ASSIGN_OR_RETURN(activations, OpenActivationFile(flags));
    request.set_features(activations->x.shape.size() == 2 ? activations->x.shape[1] : 0);
    if (!flags.x_quantized.empty()) request.set_kind(v1::CALIBRATION_KIND_MISMATCHED);
  }
  ASSIGN_OR_RETURN(const auto client, ConnectTo<CalibrationClient>(flags.connection, io));
  ASSIGN_OR_RETURN(const v1::Calibration created,
                   client->CreateCalibration(request, CallOptionsFor(io, nullptr)));
  if (activations.has_value()) {
    const absl::StatusOr<v1::StreamProgress> sent =
        Accumulate(*client, created.id(), flags, *activations, io);
    if (!sent.ok()) {
      io.err << "certiq: calibration " << Printable(created.id())
             << " was made but not filled; `certiq calibrations add` goes on with stream "
             << Printable(flags.stream) << "\n";
      return sent.status();
    }
    io.err << sent->tokens() << " tokens\n";
  }
  io.out << Printable(created.id()) << "\n";
  return kExitOk;
}

absl::StatusOr<int> RunAdd(const Flags& flags, const Io& io) {
  ASSIGN_OR_RETURN(const OpenActivations activations, OpenActivationFile(flags));
  ASSIGN_OR_RETURN(const auto client, ConnectTo<CalibrationClient>(flags.connection, io));
  ASSIGN_OR_RETURN(const v1::Calibration found,
                   client->Find(flags.calibration, CallOptionsFor(io, nullptr)));
  ASSIGN_OR_RETURN(const v1::StreamProgress sent,
                   Accumulate(*client, found.id(), flags, activations, io));
  io.out << "stream " << Printable(flags.stream) << " of " << Printable(found.id()) << ": "
         << sent.tokens() << " tokens\n";
  return kExitOk;
}

absl::StatusOr<int> RunList(const Flags& flags, const Io& io) {
  ASSIGN_OR_RETURN(const auto client, ConnectTo<CalibrationClient>(flags.connection, io));
  ASSIGN_OR_RETURN(std::vector<v1::Calibration> all,
                   client->List({.label = flags.label}, CallOptionsFor(io, nullptr)));
  if (flags.json) {
    v1::ListCalibrationsResponse response;
    for (v1::Calibration& calibration : all) {
      *response.add_calibrations() = std::move(calibration);
    }
    return PrintJson(response, io);
  }
  for (const v1::Calibration& calibration : all) {
    io.out << absl::StrFormat("%s  %-9s  N %d  %d tokens  %s  %s\n", Printable(calibration.id()),
                              Summary(calibration), calibration.features(), calibration.tokens(),
                              TimeText(calibration.create_time()),
                              Printable(absl::StrJoin(calibration.labels(), ", ")));
  }
  return kExitOk;
}

// Runs a verb on one calibration that exists, which `act` gets.
absl::StatusOr<int> RunOn(const Flags& flags, const Io& io,
                          const std::function<absl::StatusOr<int>(const CalibrationClient&,
                                                                  const v1::Calibration&)>& act) {
  ASSIGN_OR_RETURN(const auto client, ConnectTo<CalibrationClient>(flags.connection, io));
  ASSIGN_OR_RETURN(const v1::Calibration found,
                   client->Find(flags.calibration, CallOptionsFor(io, nullptr)));
  return act(*client, found);
}

absl::StatusOr<int> RunFinalize(const Flags& flags, const Io& io) {
  return RunOn(
      flags, io,
      [&](const CalibrationClient& client, const v1::Calibration& found) -> absl::StatusOr<int> {
        FinalizeRequest request = flags.finalize;
        request.calibration_id = found.id();
        ASSIGN_OR_RETURN(const v1::Calibration finalized,
                         client.Finalize(request, CallOptionsFor(io, nullptr)));
        return PrintOne(finalized, flags, io);
      });
}

absl::StatusOr<int> RunDelete(const Flags& flags, const Io& io) {
  return RunOn(
      flags, io,
      [&](const CalibrationClient& client, const v1::Calibration& found) -> absl::StatusOr<int> {
        RETURN_IF_ERROR(client.Delete(found.id(), CallOptionsFor(io, nullptr)));
        io.out << "deleted " << Printable(found.id()) << "\n";
        return kExitOk;
      });
}

void AddCreateFlags(CLI::App* verb, Flags* flags) {
  v1::CreateCalibrationRequest* const request = &flags->request;
  AddNumber<int64_t>(
      verb, "--features", "N", [request](int64_t value) { request->set_features(value); },
      "Input features; taken from the activations where they are given");
  AddChoice<v1::CalibrationKind>(
      verb, "--kind", Choices<v1::CalibrationKind>("CALIBRATION_KIND_"),
      [request](v1::CalibrationKind value) { request->set_kind(value); },
      "Whether streams bring X alone or X~ beside it (default matched; --x_quantized implies "
      "mismatched)");
  AddActivationFlags(verb, flags);
  AddText(verb, "--stream", "S", &flags->stream, "Name of the stream they go into (default 0)");
  AddRepeatedFlag(
      verb, "--label", "L",
      [request](const std::string& label) -> std::optional<std::string> {
        request->add_labels(label);
        return std::nullopt;
      },
      "A name to find it by; may be given several times");
  AddNumber<double>(
      verb, "--held_out_fraction", "F",
      [request](double value) { request->set_held_out_fraction(value); },
      "Share of the tokens kept apart to measure the error on, 0 to 0.5 (default 0)");
  AddNumber<int32_t>(
      verb, "--sequence_rows", "ROWS",
      [request](int32_t value) { request->set_sequence_rows(value); },
      "Rows of one sequence, which holding tokens out never cuts (default: blocks of 256 rows)");
  AddDuration(
      verb, "--ttl", [request](absl::Duration value) { *request->mutable_ttl() = ToProto(value); },
      "It is deleted when nothing has changed for so long (default 24h)");
  AddText(verb, "--request_id", "ID", flags->request.mutable_request_id(),
          "The same id and content again give the same calibration (default: a new one)");
}

void CheckCreate(const CLI::App& verb, const Flags& flags) {
  CheckFlags(verb, {});
  CheckConnection(verb, flags.connection);
  CheckActivationFlags(flags);
  const bool activations = !flags.activations_file.empty();
  if (activations == (IsGiven(verb, "--features"))) {
    ThrowUsageError("--features and --activations", "expected one of them");
  }
  if (!activations && IsGiven(verb, "--stream")) {
    ThrowUsageError("--stream", "expected --activations beside it");
  }
  if (activations && IsGiven(verb, "--kind") &&
      (flags.request.kind() == v1::CALIBRATION_KIND_MISMATCHED) == flags.x_quantized.empty()) {
    ThrowUsageError("--kind", "expected mismatched with --x_quantized, else matched");
  }
}

}  // namespace

void AddCalibrationsVerbs(CLI::App* app, Verbs* verbs) {
  CLI::App* const noun =
      AddNoun(app, "calibrations", "Create, fill, finalize, list and delete calibrations");
  const auto flags = std::make_shared<Flags>();
  // An object comes before the flags.
  const auto add = [&](const char* name, const char* description, bool object,
                       absl::StatusOr<int> (*run)(const Flags&, const Io&)) {
    CLI::App* const verb = AddVerb(noun, name, description);
    if (object) {
      AddObject(verb, "ID|LABEL", &flags->calibration, "The calibration, by its id or a label");
      OnParsed(verb, [verb, flags] {
        CheckFlags(*verb, {"ID|LABEL"});
        CheckConnection(*verb, flags->connection);
      });
    }
    AddConnectionFlags(verb, &flags->connection);
    verbs->push_back({verb, [flags, run](const Io& io) {
                        return ExitCode(run(*flags, io), flags->connection, io);
                      }});
    return verb;
  };
  const auto json = [&](CLI::App* verb) {
    AddSwitch(verb, "--json", &flags->json, "Print JSON, with the contract's field names");
    return verb;
  };

  CLI::App* const create = add("create", "Make a calibration and print its id", false, RunCreate);
  AddCreateFlags(create, flags.get());
  OnParsed(create, [create, flags] { CheckCreate(*create, *flags); });

  CLI::App* const fill = add("add", "Add a stream of activations, or go on with it", true, RunAdd);
  AddActivationFlags(fill, flags.get());
  AddText(fill, "--stream", "S", &flags->stream,
          "Name of the stream, unique within the calibration (required)");
  OnParsed(fill, [fill, flags] {
    CheckFlags(*fill, {"ID|LABEL"});
    CheckConnection(*fill, flags->connection);
    CheckFlags(*fill, {"--activations", "--x", "--stream"});
  });

  CLI::App* const finalize =
      json(add("finalize", "End its filling, so that jobs can use it", true, RunFinalize));
  AddNumber<int64_t>(
      finalize, "--expected_tokens", "N",
      [flags](int64_t value) { flags->finalize.expected_tokens = value; },
      "Tokens there must be, held-out ones included");
  AddTexts(finalize, "--expected_stream", "S", &flags->finalize.expected_stream_ids,
           "A stream that must be there and ended; may be given several times");

  CLI::App* const list = json(add("list", "List calibrations, newest first", false, RunList));
  AddText(list, "--label", "L", &flags->label, "Only those with this label");
  OnParsed(list, [list, flags] {
    CheckFlags(*list, {});
    CheckConnection(*list, flags->connection);
  });

  json(add("get", "Show one calibration and its streams", true, [](const Flags& f, const Io& io) {
    return RunOn(
        f, io, [&](const CalibrationClient&, const v1::Calibration& found) -> absl::StatusOr<int> {
          return PrintOne(found, f, io);
        });
  }));
  add("delete", "Delete a calibration", true, RunDelete);
}

}  // namespace certiq::cli
