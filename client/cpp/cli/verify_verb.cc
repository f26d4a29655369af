#include "verify_verb.h"

#include <cerrno>
#include <fstream>
#include <iterator>
#include <ostream>
#include <utility>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/str_cat.h"
#include "base/status_macros.h"
#include "certiq/safetensors.h"
#include "errors.h"
#include "files.h"
#include "flag_types.h"
#include "verify.h"

namespace certiq::cli {
namespace {

// No report is longer: two numbers a row and some text.
constexpr size_t kLongestReport = size_t{1} << 30;

absl::StatusOr<v1::Certificate> ReadReport(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  if (!file) return absl::ErrnoToStatus(errno, absl::StrCat(path, ": cannot be opened"));
  std::string text;
  std::string piece(size_t{1} << 16, '\0');
  while (file.read(piece.data(), static_cast<std::streamsize>(piece.size())) || file.gcount() > 0) {
    text.append(piece, 0, static_cast<size_t>(file.gcount()));
    if (text.size() > kLongestReport) {
      return absl::InvalidArgumentError(absl::StrCat(path, ": too long for a report"));
    }
  }
  if (file.bad()) return absl::InvalidArgumentError(absl::StrCat(path, ": cannot be read"));
  absl::StatusOr<v1::Certificate> certificate = verify::ParseReport(text);
  if (certificate.ok()) return certificate;
  return absl::Status(certificate.status().code(),
                      absl::StrCat(path, ": ", certificate.status().message()));
}

absl::StatusOr<verify::VerificationReport> VerifyFiles(const VerifyFlags& flags) {
  ASSIGN_OR_RETURN(const v1::Certificate certificate, ReadReport(flags.report_file));
  ASSIGN_OR_RETURN(const SafetensorsFile weights, SafetensorsFile::Open(flags.weights_file));
  ASSIGN_OR_RETURN(const SafetensorsFile activations,
                   SafetensorsFile::Open(flags.activations_file));
  ASSIGN_OR_RETURN(const SafetensorsFile result, SafetensorsFile::Open(flags.result_file));

  verify::Sources sources;
  ASSIGN_OR_RETURN(sources.weight, weights.Tensor(flags.weight));
  ASSIGN_OR_RETURN(sources.x, activations.Tensor(flags.x));
  if (!flags.x_quantized.empty()) {
    ASSIGN_OR_RETURN(sources.x_quantized, activations.Tensor(flags.x_quantized));
  }
  if (!flags.stream.empty()) sources.stream_id = flags.stream;
  sources.result = [&](const std::string& role) {
    return result.Tensor(OutputName(flags.weight, role));
  };
  return verify::Verify(sources, certificate);
}

}  // namespace

CLI::App* AddVerifyVerb(CLI::App* app, VerifyFlags* flags) {
  CLI::App* const verb =
      AddVerb(app, "verify", "Check a result and its report against the weights and activations");
  AddText(verb, "--weights", "F.safetensors", &flags->weights_file,
          "File of the original weights (required)");
  AddText(verb, "--weight", "NAME", &flags->weight, "Name of the weights in it (required)");
  AddText(verb, "--activations", "F.safetensors", &flags->activations_file,
          "File of the activations (required)");
  AddText(verb, "--x", "NAME", &flags->x, "Name of the activations of the float model (required)");
  AddText(verb, "--x_quantized", "NAME", &flags->x_quantized,
          "Name of those that the layer sees once earlier layers are quantized");
  AddText(verb, "--stream", "S", &flags->stream,
          "Stream that added them to the calibration, where that had one and held tokens out");
  AddText(verb, "--result", "F.safetensors", &flags->result_file,
          "File that `quantize` or `result` wrote with --output (required)");
  AddText(verb, "--report", "REPORT.json", &flags->report_file,
          "File that it wrote with --report (required)");
  OnParsed(verb, [verb] {
    CheckFlags(*verb, {"--weights", "--weight", "--activations", "--x", "--result", "--report"});
  });
  return verb;
}

int RunVerify(const VerifyFlags& flags, const Io& io) {
  const absl::StatusOr<verify::VerificationReport> report = VerifyFiles(flags);
  if (!report.ok()) {
    PrintError(report.status(), "", io.err);
    return kExitFailed;
  }
  io.out << Printable(flags.weight) << "\n"
         << verify::FindingsText(*report) << verify::VerdictText(*report);
  return report->count(verify::Verdict::kWrong) == 0 ? kExitOk : kExitFailed;
}

}  // namespace certiq::cli
