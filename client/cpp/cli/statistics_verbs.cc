// `certiq import` and `certiq export`: sums made elsewhere, and sums for elsewhere.
#include <memory>
#include <optional>
#include <ostream>
#include <utility>

#include "CLI/CLI.hpp"
#include "absl/strings/str_cat.h"
#include "certiq/calibration_client.h"
#include "certiq/safetensors.h"
#include "certiq/statistics.h"
#include "errors.h"
#include "flag_types.h"
#include "verb.h"

namespace certiq::cli {
namespace {

// As given.
struct Flags {
  ConnectionFlags connection;
  std::string calibration;
  std::optional<v1::Portion> portion;
  // Import.
  std::string statistics_file;
  std::string stream;
  std::optional<int64_t> tokens;
  StatisticsNames names = {.gram = ""};
  // Export.
  std::string output_file;
  v1::MatrixLayout layout = v1::MATRIX_LAYOUT_UPPER;
};

// The file's tensors with what flags and metadata say about them. Flags go first; a number of
// tokens that contradicts the file is refused, since one of the two is wrong.
absl::StatusOr<StatisticsView> Read(const SafetensorsFile& file, const Flags& flags) {
  const absl::StatusOr<StatisticsMetadata> metadata = ReadStatisticsMetadata(file);
  if (!metadata.ok()) return metadata.status();
  StatisticsNames names = flags.names;
  if (names.gram.empty()) {
    names.gram = "gram";
    if (metadata->mismatched) names = {"gram", "gram_quantized", "cross"};
  }
  absl::StatusOr<StatisticsView> view = ReadStatistics(file, names);
  if (!view.ok()) return view.status();
  const std::optional<int64_t> tokens = flags.tokens.has_value() ? flags.tokens : metadata->tokens;
  if (!tokens.has_value()) {
    return absl::InvalidArgumentError(
        absl::StrCat("--tokens: expected the number of tokens that were summed: ", file.path(),
                     " does not say it"));
  }
  if (metadata->tokens.value_or(*tokens) != *tokens) {
    return absl::InvalidArgumentError(absl::StrCat("--tokens: expected ", *metadata->tokens, " as ",
                                                   file.path(), " says, got ", *tokens));
  }
  view->tokens = *tokens;
  view->portion = flags.portion.value_or(metadata->portion.value_or(v1::PORTION_FIT));
  return view;
}

int RunImport(const Flags& flags, const Io& io) {
  const absl::StatusOr<SafetensorsFile> file = SafetensorsFile::Open(flags.statistics_file);
  if (!file.ok()) return Fail(file.status(), flags.connection, io);
  const absl::StatusOr<StatisticsView> view = Read(*file, flags);
  if (!view.ok()) return Fail(view.status(), flags.connection, io);
  const auto client = ConnectTo<CalibrationClient>(flags.connection, io);
  if (!client.ok()) return Fail(client.status(), flags.connection, io);
  const absl::StatusOr<v1::Calibration> found =
      (*client)->Find(flags.calibration, CallOptionsFor(io, nullptr));
  if (!found.ok()) return Fail(found.status(), flags.connection, io);
  absl::StatusOr<v1::ImportStatisticsResponse> response;
  {
    ProgressPrinter progress(&io.err, io.err_is_terminal);
    response = (*client)->Import(found->id(), flags.stream, *view, CallOptionsFor(io, &progress));
  }
  if (!response.ok()) return Fail(response.status(), flags.connection, io);
  if (response->already_committed()) {
    io.out << "stream " << Printable(flags.stream) << " of " << Printable(found->id())
           << ": was there already; nothing was added\n";
    return kExitOk;
  }
  io.out << "stream " << Printable(flags.stream) << " of " << Printable(found->id()) << ": "
         << view->tokens << " tokens\n";
  return kExitOk;
}

int RunExport(const Flags& flags, const Io& io) {
  if (absl::Status status = AtomicFile::CheckWritable(flags.output_file); !status.ok()) {
    return Fail(status, flags.connection, io);
  }
  const auto client = ConnectTo<CalibrationClient>(flags.connection, io);
  if (!client.ok()) return Fail(client.status(), flags.connection, io);
  const absl::StatusOr<v1::Calibration> found =
      (*client)->Find(flags.calibration, CallOptionsFor(io, nullptr));
  if (!found.ok()) return Fail(found.status(), flags.connection, io);
  const absl::StatusOr<Statistics> statistics =
      (*client)->Export(found->id(), flags.portion.value_or(v1::PORTION_FIT), flags.layout,
                        CallOptionsFor(io, nullptr));
  if (!statistics.ok()) return Fail(statistics.status(), flags.connection, io);
  absl::StatusOr<AtomicFile> staged = StageStatistics(flags.output_file, statistics->View());
  if (!staged.ok()) return Fail(staged.status(), flags.connection, io);
  if (io.interrupt.stop_requested()) {
    return Fail(absl::CancelledError("interrupted"), flags.connection, io);
  }
  if (absl::Status status = staged->Commit(); !status.ok()) {
    return Fail(status, flags.connection, io);
  }
  io.out << "wrote " << flags.output_file << ": sums of " << statistics->tokens << " tokens\n";
  return kExitOk;
}

void CheckImport(const CLI::App& verb, const Flags& flags) {
  CheckFlags(verb, {"ID|LABEL"});
  CheckConnection(verb, flags.connection);
  CheckFlags(verb, {"--statistics", "--stream"});
  if (flags.names.gram_quantized.empty() != flags.names.cross.empty()) {
    throw CLI::ValidationError("--gram_quantized and --cross", "expected both or none");
  }
  if (flags.names.gram.empty() && !flags.names.cross.empty()) {
    throw CLI::ValidationError("--gram_quantized and --cross", "expected --gram beside them");
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
  CLI::App* const import =
      AddCommon(app, "import", "Add ready-made sums to a calibration", flags.get());
  AddText(import, "--statistics", "F.safetensors", &flags->statistics_file,
          "File with the sums, F64 or F32, full or upper triangle row by row (required)");
  AddText(import, "--stream", "S", &flags->stream,
          "Name they are added under, once, unique within the calibration (required)");
  AddNumber<int64_t>(
      import, "--tokens", "N", [flags](int64_t value) { flags->tokens = value; },
      "Tokens that were summed (required unless `export` wrote the file)");
  AddText(import, "--gram", "NAME", &flags->names.gram, "X^T X (default gram)");
  AddText(import, "--gram_quantized", "NAME", &flags->names.gram_quantized,
          "X~^T X~, for mismatched calibrations");
  AddText(import, "--cross", "NAME", &flags->names.cross,
          "X~^T X, for mismatched calibrations; always full");
  import->callback([import, flags] { CheckImport(*import, *flags);
});
verbs->push_back({import, [flags](const Io& io) { return RunImport(*flags, io); }});

CLI::App* const to_file =
    AddCommon(app, "export", "Save the sums of a calibration for `import`", flags.get());
AddText(to_file, "--output", "F.safetensors", &flags->output_file, "Where the sums go (required)");
AddChoice<v1::MatrixLayout>(
    to_file, "--layout", Choices<v1::MatrixLayout>("MATRIX_LAYOUT_"),
    [flags](v1::MatrixLayout value) { flags->layout = value; },
    "Symmetric sums whole or by their upper triangle (default upper)");
to_file->callback([to_file, flags] {
  CheckFlags(*to_file, {"ID|LABEL"});
  CheckConnection(*to_file, flags->connection);
  CheckFlags(*to_file, {"--output"});
});
verbs->push_back({to_file, [flags](const Io& io) { return RunExport(*flags, io); }});
}  // namespace certiq::cli

}  // namespace certiq::cli
