#include "quantize_verb.h"

#include <memory>
#include <optional>
#include <ostream>
#include <string>
#include <utility>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "base/status_macros.h"
#include "certiq/client.h"
#include "certiq/safetensors.h"
#include "certiq/uuid.h"
#include "connection_flags.h"
#include "errors.h"
#include "files.h"
#include "progress.h"
#include "summary.h"
#include "verb.h"

namespace certiq::cli {
namespace {

// The flags' files, open, and the request whose views point into them.
struct Inputs {
  std::optional<OpenWeight> weights;
  std::optional<OpenActivations> activations;
  QuantizeRequestData request;
};

absl::StatusOr<Inputs> OpenInputs(const QuantizeFlags& flags) {
  Inputs inputs;
  QuantizeRequestData& request = inputs.request;
  ASSIGN_OR_RETURN(inputs.weights, OpenWeightFile(flags));
  request.weight = inputs.weights->weight;
  if (!flags.activations_file.empty()) {
    ASSIGN_OR_RETURN(inputs.activations, OpenActivationFile(flags));
    request.x = inputs.activations->x;
    request.x_quantized = inputs.activations->x_quantized;
  }
  request.request_id = RandomUuid();
  request.layer_name = flags.weight;
  request.spec = flags.spec;
  request.held_out_fraction = flags.held_out_fraction;
  request.sequence_rows = flags.sequence_rows;
  return inputs;
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
  const absl::StatusOr<std::unique_ptr<Client>> client = ConnectTo<Client>(flags.connection, io);
  if (!client.ok()) return failed(client.status(), "");
  absl::StatusOr<Inputs> inputs = OpenInputs(flags);
  if (!inputs.ok()) return failed(inputs.status(), "");
  if (!flags.calibration.empty()) {
    const absl::StatusOr<v1::Calibration> calibration =
        FindFinalized(flags.connection, io, flags.calibration);
    if (!calibration.ok()) return Fail(calibration.status(), flags.connection, io);
    inputs->request.calibration_id = calibration->id();
  }

  absl::StatusOr<QuantizeResult> result;
  {
    ProgressPrinter progress(&io.err, io.err_is_terminal);
    result = (*client)->Quantize(inputs->request, CallOptionsFor(io, &progress));
  }
  if (!result.ok()) {
    return failed(result.status(),
                  AdviceFor(result.status(), flags.connection.server, inputs->request.request_id));
  }
  if (absl::Status status = WriteOutputs(flags, flags.weight, *result, io.interrupt);
      !status.ok()) {
    return failed(status, "");
  }
  io.out << SummaryText(flags.weight, inputs->request.weight.dtype, result->certificate);
  PrintWritten(flags, io.out);
  return kExitOk;
}

}  // namespace certiq::cli
