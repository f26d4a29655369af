#include "quantize_verb.h"

#include <memory>
#include <optional>
#include <ostream>
#include <string>
#include <utility>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "certiq/client.h"
#include "certiq/safetensors.h"
#include "certiq/uuid.h"
#include "connection_flags.h"
#include "errors.h"
#include "files.h"
#include "progress.h"
#include "summary.h"

namespace certiq::cli {
namespace {

// The flags' files, open, and the request whose views point into them.
struct Inputs {
  std::optional<SafetensorsFile> weights;
  std::optional<SafetensorsFile> activations;
  QuantizeRequestData request;
};

absl::StatusOr<Inputs> OpenInputs(const QuantizeFlags& flags) {
  Inputs inputs;
  absl::StatusOr<SafetensorsFile> weights = SafetensorsFile::Open(flags.weights_file);
  if (!weights.ok()) return weights.status();
  inputs.weights = *std::move(weights);
  absl::StatusOr<TensorView> weight = inputs.weights->Tensor(flags.weight);
  if (!weight.ok()) return weight.status();
  QuantizeRequestData& request = inputs.request;
  request.weight = *std::move(weight);

  if (!flags.activations_file.empty()) {
    absl::StatusOr<SafetensorsFile> activations = SafetensorsFile::Open(flags.activations_file);
    if (!activations.ok()) return activations.status();
    inputs.activations = *std::move(activations);
    absl::StatusOr<TensorView> x = inputs.activations->Tensor(flags.x);
    if (!x.ok()) return x.status();
    request.x = *std::move(x);
    if (!flags.x_quantized.empty()) {
      absl::StatusOr<TensorView> x_quantized = inputs.activations->Tensor(flags.x_quantized);
      if (!x_quantized.ok()) return x_quantized.status();
      request.x_quantized = *std::move(x_quantized);
    }
  }
  request.request_id = RandomUuid();
  request.layer_name = flags.weight;
  request.spec = flags.spec;
  request.held_out_fraction = flags.held_out_fraction;
  request.calibration_id = flags.calibration;
  return inputs;
}

// Hours of work should not end at a folder that does not exist.
absl::Status CheckOutputs(const QuantizeFlags& flags) {
  for (const std::string& path : {flags.output_file, flags.report_file}) {
    if (path.empty()) continue;
    if (absl::Status status = AtomicFile::CheckWritable(path); !status.ok()) return status;
  }
  return absl::OkStatus();
}

absl::Status WriteOutputs(const QuantizeFlags& flags, const QuantizeResult& result,
                          const std::stop_token& interrupt) {
  std::optional<AtomicFile> output;
  std::optional<AtomicFile> report;
  if (!flags.output_file.empty()) {
    absl::StatusOr<AtomicFile> staged = StageResult(flags.output_file, flags.weight, result);
    if (!staged.ok()) return staged.status();
    output = *std::move(staged);
  }
  if (!flags.report_file.empty()) {
    absl::StatusOr<AtomicFile> staged = StageReport(flags.report_file, result.certificate);
    if (!staged.ok()) return staged.status();
    report = *std::move(staged);
  }
  if (interrupt.stop_requested()) return absl::CancelledError("interrupted");
  for (std::optional<AtomicFile>* file : {&output, &report}) {
    if (!file->has_value()) continue;
    if (absl::Status status = (*file)->Commit(); !status.ok()) return status;
  }
  return absl::OkStatus();
}

}  // namespace

int RunQuantize(const QuantizeFlags& flags, const Io& io) {
  const auto failed = [&io](const absl::Status& status, absl::string_view advice) {
    if (io.interrupt.stop_requested()) {
      io.err << "certiq: interrupted; nothing was written\n";
      return kExitInterrupted;
    }
    PrintError(status, advice, io.err);
    return kExitFailed;
  };
  if (absl::Status status = CheckOutputs(flags); !status.ok()) return failed(status, "");
  const absl::StatusOr<std::unique_ptr<Client>> client = Connect(flags.connection, io);
  if (!client.ok()) return failed(client.status(), "");
  const absl::StatusOr<Inputs> inputs = OpenInputs(flags);
  if (!inputs.ok()) return failed(inputs.status(), "");

  absl::StatusOr<QuantizeResult> result;
  {
    ProgressPrinter progress(&io.err, io.err_is_terminal);
    QuantizeOptions options;
    options.progress = [&progress](const ProgressEvent& event) { progress.Show(event); };
    options.cancel = io.interrupt;
    result = (*client)->Quantize(inputs->request, options);
  }
  if (!result.ok()) {
    return failed(result.status(),
                  AdviceFor(result.status(), flags.connection.server, inputs->request.request_id));
  }
  if (absl::Status status = WriteOutputs(flags, *result, io.interrupt); !status.ok()) {
    return failed(status, "");
  }
  io.out << SummaryText(flags.weight, inputs->request.weight.dtype, result->certificate);
  for (const std::string& path : {flags.output_file, flags.report_file}) {
    if (!path.empty()) io.out << "wrote           " << path << "\n";
  }
  return kExitOk;
}

}  // namespace certiq::cli
