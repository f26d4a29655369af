// The flags of a QuantizationSpec, for every verb that quantizes.
#ifndef CERTIQ_CLIENT_CPP_CLI_SPEC_FLAGS_H_
#define CERTIQ_CLIENT_CPP_CLI_SPEC_FLAGS_H_

#include "certiq/v1/spec.pb.h"

namespace CLI {
class App;
}  // namespace CLI

namespace certiq::cli {

// Parsing fills `*spec`, which must outlive the app; fields whose flags are not given stay unset,
// but for compare_nearest, which is true at once. Values that can be read but make no sense, such
// as 9 bits, are kept for the server to reject.
void AddSpecFlags(CLI::App* verb, v1::QuantizationSpec* spec);

// Throws CLI::ParseError, naming both, where two flags set the same field; for OnParsed.
void CheckSpecFlags(const CLI::App& verb);

}  // namespace certiq::cli

#endif  // CERTIQ_CLIENT_CPP_CLI_SPEC_FLAGS_H_
