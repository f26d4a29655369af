// Output files of the command: the result's tensors and the certificate.
#ifndef CERTIQ_CLIENT_CPP_CLI_FILES_H_
#define CERTIQ_CLIENT_CPP_CLI_FILES_H_

#include <string>

#include "absl/status/statusor.h"
#include "certiq/atomic_file.h"
#include "certiq/client.h"
#include "certiq/v1/certificate.pb.h"
#include "google/protobuf/message.h"

namespace certiq::cli {

// A role of the result as a tensor name: "weight" is NAME itself; any other is beside it,
// "model.q_proj.scales" for "scales" of "model.q_proj.weight".
std::string OutputName(const std::string& weight, const std::string& role);

// The result under its output names, on disk but for Commit(). INTERNAL where two roles come to
// the same name.
absl::StatusOr<AtomicFile> StageResult(const std::string& path, const std::string& weight,
                                       const QuantizeResult& result);

// Protobuf JSON with the contract's field names, defaults printed, and a newline at the end.
absl::StatusOr<std::string> JsonText(const google::protobuf::Message& message);

// The certificate as JsonText.
absl::StatusOr<std::string> ReportText(const v1::Certificate& certificate);

// ReportText on disk but for Commit().
absl::StatusOr<AtomicFile> StageReport(const std::string& path, const v1::Certificate& certificate);

}  // namespace certiq::cli

#endif  // CERTIQ_CLIENT_CPP_CLI_FILES_H_
