// `certiq import` and `certiq export`.
#include <memory>
#include <optional>
#include <ostream>
#include <utility>

#include "absl/strings/str_cat.h"
#include "base/status_macros.h"
#include "certiq/calibration_client.h"
#include "certiq/safetensors.h"
#include "certiq/statistics.h"
#include "errors.h"
#include "flag_types.h"
#include "verb.h"

namespace certiq::cli {
namespace {

// Values as given.
struct Flags {
  ConnectionFlags connection;
  std::string calibration;
  std::optional<v1::Portion> portion;
  // Used by import.
  std::string statistics_file;
  std::string stream;
  std::optional<int64_t> tokens;
  StatisticsNames names = {.gram = ""};
  // Used by export.
  std::string output_file;
  v1::MatrixLayout layout = v1::MATRIX_LAYOUT_UPPER;
};

// The file's tensors with what flags and metadata say about them. Flags go first; a number of
// tokens that contradicts the file is rejected, since one of the two is wrong.
absl::StatusOr<StatisticsView> Read(const SafetensorsFile& file, const Flags& flags) {
  ASSIGN_OR_RETURN(const StatisticsMetadata metadata, ReadStatisticsMetadata(file));
  StatisticsNames names = flags.names;
  if (names.gram.empty()) {
    names.gram = "gram";
    if (metadata.mismatched) names = {"gram", "gram_quantized", "cross"};
  }
  ASSIGN_OR_RETURN(StatisticsView view, ReadStatistics(file, names));
  const std::optional<int64_t> tokens = flags.tokens.has_value() ? flags.tokens : metadata.tokens;
  if (!tokens.has_value()) {
    return absl::InvalidArgumentError(
        absl::StrCat("--tokens: expected the number of tokens that were summed: ", file.path(),
                     " does not say it"));
  }
  if (metadata.tokens.value_or(*tokens) != *tokens) {
    return absl::InvalidArgumentError(absl::StrCat("--tokens: expected ", *metadata.tokens, " as ",
                                                   file.path(), " says, got ", *tokens));
  }
  view.tokens = *tokens;
  view.portion = flags.portion.value_or(metadata.portion.value_or(v1::PORTION_FIT));
  return view;
}

absl::StatusOr<int> RunImport(const Flags& flags, const Io& io) {
  ASSIGN_OR_RETURN(const SafetensorsFile file, SafetensorsFile::Open(flags.statistics_file));
  ASSIGN_OR_RETURN(const StatisticsView view, Read(file, flags));
  ASSIGN_OR_RETURN(const auto client, ConnectTo<CalibrationClient>(flags.connection, io));
  ASSIGN_OR_RETURN(const v1::Calibration found,
                   client->Find(flags.calibration, CallOptionsFor(io, nullptr)));
  absl::StatusOr<v1::ImportStatisticsResponse> response;
  {
    ProgressPrinter progress(&io.err, io.err_is_terminal);
    response = client->Import(found.id(), flags.stream, view, CallOptionsFor(io, &progress));
  }
  RETURN_IF_ERROR(response.status());
  if (response->already_committed()) {
    io.out << "stream " << Printable(flags.stream) << " of " << Printable(found.id())
           << ": was there already; nothing was added\n";
    return kExitOk;
  }
  io.out << "stream " << Printable(flags.stream) << " of " << Printable(found.id()) << ": "
         << view.tokens << " tokens\n";
  return kExitOk;
}

absl::StatusOr<int> RunExport(const Flags& flags, const Io& io) {
  RETURN_IF_ERROR(AtomicFile::CheckWritable(flags.output_file));
  ASSIGN_OR_RETURN(const auto client, ConnectTo<CalibrationClient>(flags.connection, io));
  ASSIGN_OR_RETURN(const v1::Calibration found,
                   client->Find(flags.calibration, CallOptionsFor(io, nullptr)));
  ASSIGN_OR_RETURN(const Statistics statistics,
                   client->Export(found.id(), flags.portion.value_or(v1::PORTION_FIT), flags.layout,
                                  CallOptionsFor(io, nullptr)));
  ASSIGN_OR_RETURN(AtomicFile staged, StageStatistics(flags.output_file, statistics.View()));
  if (io.interrupt.stop_requested()) {
    return absl::CancelledError("interrupted");
  }
  RETURN_IF_ERROR(staged.Commit());
  io.out << "wrote " << flags.output_file << ": sums of " << statistics.tokens << " tokens\n";
  return kExitOk;
}

void CheckImport(const CLI::App& verb, const Flags& flags) {
  CheckFlags(verb, {"ID|LABEL"});
  CheckConnection(verb, flags.connection);
  CheckFlags(verb, {"--statistics", "--stream"});
  if (flags.names.gram_quantized.empty() != flags.names.cross.empty()) {
    ThrowUsageError("--gram_quantized and --cross", "expected both or none");
  }
  if (flags.names.gram.empty() && !flags.names.cross.empty()) {
    ThrowUsageError("--gram_quantized and --cross", "expected --gram beside them");
  }
}

CLI::App* AddCommon(CLI::App* app, const char* name, const char* description, Flags* flags) {
  CLI::App* const verb = AddVerb(app, name, description);
  AddObject(verb, "ID|LABEL", &flags->calibration, "The calibration, by its id or a label");
  AddConnectionFlags(verb, &flags->connection);
  AddChoice<v1::Portion>(
      verb, "--portion", Choices<v1::Portion>("PORTION_"),
      [flags](v1::Portion value) { flags->portion = value; },
      "Sums of the tokens to fit or of those held out (default fit)");
  return verb;
}

}  // namespace

void AddStatisticsVerbs(CLI::App* app, Verbs* verbs) {
  const auto flags = std::make_shared<Flags>();
  CLI::App* const import_verb =
      AddCommon(app, "import", "Add ready-made sums to a calibration", flags.get());
  AddText(import_verb, "--statistics", "F.safetensors", &flags->statistics_file,
          "File with the sums, F64 or F32, full or upper triangle row by row (required)");
  AddText(import_verb, "--stream", "S", &flags->stream,
          "Name they are added under, once, unique within the calibration (required)");
  AddNumber<int64_t>(
      import_verb, "--tokens", "N", [flags](int64_t value) { flags->tokens = value; },
      "Tokens that were summed (required unless `export` wrote the file)");
  AddText(import_verb, "--gram", "NAME", &flags->names.gram, "X^T X (default gram)");
  AddText(import_verb, "--gram_quantized", "NAME", &flags->names.gram_quantized,
          "X~^T X~, for mismatched calibrations");
  AddText(import_verb, "--cross", "NAME", &flags->names.cross,
          "X~^T X, for mismatched calibrations; always full");
  OnParsed(import_verb, [import_verb, flags] { CheckImport(*import_verb, *flags); });
  verbs->push_back({import_verb, [flags](const Io& io) {
                      return ExitCode(RunImport(*flags, io), flags->connection, io);
                    }});

  CLI::App* const export_verb =
      AddCommon(app, "export", "Save the sums of a calibration for `import`", flags.get());
  AddText(export_verb, "--output", "F.safetensors", &flags->output_file,
          "Where the sums go (required)");
  AddChoice<v1::MatrixLayout>(
      export_verb, "--layout", Choices<v1::MatrixLayout>("MATRIX_LAYOUT_"),
      [flags](v1::MatrixLayout value) { flags->layout = value; },
      "Symmetric sums whole or by their upper triangle (default upper)");
  OnParsed(export_verb, [export_verb, flags] {
    CheckFlags(*export_verb, {"ID|LABEL"});
    CheckConnection(*export_verb, flags->connection);
    CheckFlags(*export_verb, {"--output"});
  });
  verbs->push_back({export_verb, [flags](const Io& io) {
                      return ExitCode(RunExport(*flags, io), flags->connection, io);
                    }});
}

}  // namespace certiq::cli
