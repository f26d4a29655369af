// The files of a layer: weights and activations in, result and report out, and their flags.
#ifndef CERTIQ_CLIENT_CPP_CLI_LAYER_FILES_H_
#define CERTIQ_CLIENT_CPP_CLI_LAYER_FILES_H_

#include <optional>
#include <ostream>
#include <stop_token>
#include <string>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "certiq/client.h"
#include "certiq/safetensors.h"

namespace CLI {
class App;
}  // namespace CLI

namespace certiq::cli {

// Values as given; empty where a flag was not.
struct WeightFlags {
  std::string weights_file;
  std::string weight;
};

struct ActivationFlags {
  std::string activations_file;
  std::string x;
  std::string x_quantized;
};

struct OutputFlags {
  std::string output_file;
  std::string report_file;
};

// Parsing fills what they point to, which must outlive the app.
void AddWeightFlags(CLI::App* verb, WeightFlags* flags);
void AddActivationFlags(CLI::App* verb, ActivationFlags* flags);
void AddOutputFlags(CLI::App* verb, OutputFlags* flags);

// For a verb's callback: throw CLI::ParseError where flags that need each other are not together.
void CheckActivationFlags(const ActivationFlags& flags);
void CheckOutputFlags(const OutputFlags& flags);

// Tensors whose views point into the open file.
struct OpenWeight {
  SafetensorsFile file;
  TensorView weight;
};
struct OpenActivations {
  SafetensorsFile file;
  TensorView x;
  std::optional<TensorView> x_quantized;
};

// Errors as SafetensorsFile.
absl::StatusOr<OpenWeight> OpenWeightFile(const WeightFlags& flags);
absl::StatusOr<OpenActivations> OpenActivationFile(const ActivationFlags& flags);

// OK where WriteOutputs would succeed now, checked before a call that may take hours.
absl::Status CheckOutputs(const OutputFlags& flags);

// Writes the files that were asked for, `weight` being the name of the layer's weights: both or
// none unless the second rename itself fails. CANCELLED, and nothing written, where `interrupt` was
// stopped.
absl::Status WriteOutputs(const OutputFlags& flags, const std::string& weight,
                          const QuantizeResult& result, const std::stop_token& interrupt);

// A line for each file that WriteOutputs wrote.
void PrintWritten(const OutputFlags& flags, std::ostream& out);

}  // namespace certiq::cli

#endif  // CERTIQ_CLIENT_CPP_CLI_LAYER_FILES_H_
