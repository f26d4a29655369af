#include "verify_verb.h"

#include <cerrno>
#include <fstream>
#include <iterator>
#include <ostream>
#include <utility>

#include "CLI/CLI.hpp"
#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/str_cat.h"
#include "certiq/safetensors.h"
#include "errors.h"
#include "files.h"
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

absl::StatusOr<verify::Ledger> VerifyFiles(const VerifyFlags& flags) {
  const absl::StatusOr<v1::Certificate> certificate = ReadReport(flags.report_file);
  if (!certificate.ok()) return certificate.status();
  const absl::StatusOr<SafetensorsFile> weights = SafetensorsFile::Open(flags.weights_file);
  if (!weights.ok()) return weights.status();
  const absl::StatusOr<SafetensorsFile> activations = SafetensorsFile::Open(flags.activations_file);
  if (!activations.ok()) return activations.status();
  const absl::StatusOr<SafetensorsFile> result = SafetensorsFile::Open(flags.result_file);
  if (!result.ok()) return result.status();

  verify::Sources sources;
  absl::StatusOr<TensorView> weight = weights->Tensor(flags.weight);
  if (!weight.ok()) return weight.status();
  sources.weight = *std::move(weight);
  absl::StatusOr<TensorView> x = activations->Tensor(flags.x);
  if (!x.ok()) return x.status();
  sources.x = *std::move(x);
  if (!flags.x_quantized.empty()) {
    absl::StatusOr<TensorView> x_quantized = activations->Tensor(flags.x_quantized);
    if (!x_quantized.ok()) return x_quantized.status();
    sources.x_quantized = *std::move(x_quantized);
  }
  if (!flags.stream.empty()) sources.stream_id = flags.stream;
  sources.result = [&](const std::string& role) {
    return result->Tensor(OutputName(flags.weight, role));
  };
  return verify::Verify(sources, *certificate);
}

}  // namespace

CLI::App* AddVerifyVerb(CLI::App* app, VerifyFlags* flags) {
  CLI::App* const verb = app->add_subcommand(
      "verify", "Check a result and its report against the weights and activations");
  const auto add = [verb](const char* name, std::string* value, const char* description) {
    return verb->add_option(name, *value, description);
  };
  add("--weights", &flags->weights_file, "Safetensors file of the original weights")->required();
  add("--weight", &flags->weight, "Name of the weights in it")->required();
  add("--activations", &flags->activations_file, "Safetensors file of the activations")->required();
  add("--x", &flags->x, "Name of the activations of the float model")->required();
  add("--x_quantized", &flags->x_quantized, "Name of those the layer really sees");
  add("--stream", &flags->stream,
      "Stream that added them to the calibration, where that had one and held tokens out");
  add("--result", &flags->result_file, "What `quantize` or `result` wrote with --output")
      ->required();
  add("--report", &flags->report_file, "What it wrote with --report")->required();
  return verb;
}

int RunVerify(const VerifyFlags& flags, const Io& io) {
  const absl::StatusOr<verify::Ledger> ledger = VerifyFiles(flags);
  if (!ledger.ok()) {
    PrintError(ledger.status(), "", io.err);
    return kExitFailed;
  }
  io.out << Printable(flags.weight) << "\n"
         << verify::FindingsText(*ledger) << verify::VerdictText(*ledger);
  return ledger->count(verify::Verdict::kWrong) == 0 ? kExitOk : kExitFailed;
}

}  // namespace certiq::cli
