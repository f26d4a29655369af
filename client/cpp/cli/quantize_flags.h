// The flags of `certiq quantize`.
#ifndef CERTIQ_CLIENT_CPP_CLI_QUANTIZE_FLAGS_H_
#define CERTIQ_CLIENT_CPP_CLI_QUANTIZE_FLAGS_H_

#include <cstdint>
#include <optional>
#include <string>

#include "certiq/v1/spec.pb.h"
#include "connection_flags.h"
#include "layer_files.h"

namespace CLI {
class App;
}  // namespace CLI

namespace certiq::cli {

// Values as given; empty or unset where a flag was not. Values that can be read but make no sense,
// such as 9 bits, are kept for the server to reject.
struct QuantizeFlags : WeightFlags, ActivationFlags, OutputFlags {
  ConnectionFlags connection;
  std::string calibration;
  std::optional<double> held_out_fraction;
  int32_t sequence_rows = 0;
  v1::QuantizationSpec spec;
};

// Adds the verb with all its flags; parsing fills `*flags`, which must outlive the app. Errors of
// use are CLI::ParseError, thrown by the parse.
CLI::App* AddQuantizeVerb(CLI::App* app, QuantizeFlags* flags);

// The flag that sets a field of a request, "--bits" for "spec.bits"; empty if none does.
std::string FlagForField(const std::string& field);

}  // namespace certiq::cli

#endif  // CERTIQ_CLIENT_CPP_CLI_QUANTIZE_FLAGS_H_
