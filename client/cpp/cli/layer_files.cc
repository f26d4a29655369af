#include "layer_files.h"

#include <ostream>
#include <utility>

#include "base/status_macros.h"
#include "certiq/atomic_file.h"
#include "files.h"
#include "flag_types.h"

namespace certiq::cli {

void AddWeightFlags(CLI::App* verb, WeightFlags* flags) {
  AddText(verb, "--weights", "F.safetensors", &flags->weights_file,
          "File with the weights (required)");
  AddText(verb, "--weight", "NAME", &flags->weight,
          "The weights' tensor [R, N] (required); also the layer's name");
}

void AddActivationFlags(CLI::App* verb, ActivationFlags* flags) {
  AddText(verb, "--activations", "F.safetensors", &flags->activations_file,
          "File with the activations");
  AddText(verb, "--x", "NAME", &flags->x, "Activations [tokens, N] of the float model");
  AddText(verb, "--x_quantized", "NAME", &flags->x_quantized,
          "The same tokens as the layer sees them once earlier layers are quantized");
}

void AddOutputFlags(CLI::App* verb, OutputFlags* flags) {
  AddText(verb, "--output", "OUT.safetensors", &flags->output_file,
          "Where the result goes; not written if not given");
  AddText(verb, "--report", "REPORT.json", &flags->report_file,
          "Where the certificate goes as JSON; not written if not given");
}

void CheckActivationFlags(const ActivationFlags& flags) {
  if (flags.activations_file.empty() != flags.x.empty()) {
    ThrowUsageError("--activations and --x", "expected both or none");
  }
  if (!flags.x_quantized.empty() && flags.x.empty()) {
    ThrowUsageError("--x_quantized", "expected --activations and --x beside it");
  }
}

void CheckOutputFlags(const OutputFlags& flags) {
  if (!flags.output_file.empty() && flags.output_file == flags.report_file) {
    ThrowUsageError("--output and --report", "expected two different files");
  }
}

absl::StatusOr<OpenWeight> OpenWeightFile(const WeightFlags& flags) {
  ASSIGN_OR_RETURN(SafetensorsFile file, SafetensorsFile::Open(flags.weights_file));
  ASSIGN_OR_RETURN(TensorView weight, file.Tensor(flags.weight));
  return OpenWeight{std::move(file), std::move(weight)};
}

absl::StatusOr<OpenActivations> OpenActivationFile(const ActivationFlags& flags) {
  ASSIGN_OR_RETURN(SafetensorsFile file, SafetensorsFile::Open(flags.activations_file));
  ASSIGN_OR_RETURN(TensorView x, file.Tensor(flags.x));
  std::optional<TensorView> x_quantized;
  if (!flags.x_quantized.empty()) {
    ASSIGN_OR_RETURN(x_quantized, file.Tensor(flags.x_quantized));
  }
  return OpenActivations{std::move(file), std::move(x), std::move(x_quantized)};
}

absl::Status CheckOutputs(const OutputFlags& flags) {
  for (const std::string& path : {flags.output_file, flags.report_file}) {
    if (path.empty()) continue;
    RETURN_IF_ERROR(AtomicFile::CheckWritable(path));
  }
  return absl::OkStatus();
}

absl::Status WriteOutputs(const OutputFlags& flags, const std::string& weight,
                          const QuantizeResult& result, const std::stop_token& interrupt) {
  std::optional<AtomicFile> output;
  std::optional<AtomicFile> report;
  if (!flags.output_file.empty()) {
    ASSIGN_OR_RETURN(output, StageResult(flags.output_file, weight, result));
  }
  if (!flags.report_file.empty()) {
    ASSIGN_OR_RETURN(report, StageReport(flags.report_file, result.certificate));
  }
  if (interrupt.stop_requested()) return absl::CancelledError("interrupted");
  for (std::optional<AtomicFile>* file : {&output, &report}) {
    if (!file->has_value()) continue;
    RETURN_IF_ERROR((*file)->Commit());
  }
  return absl::OkStatus();
}

void PrintWritten(const OutputFlags& flags, std::ostream& out) {
  for (const std::string& path : {flags.output_file, flags.report_file}) {
    if (!path.empty()) out << "wrote           " << path << "\n";
  }
}

}  // namespace certiq::cli
