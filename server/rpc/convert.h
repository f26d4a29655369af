// Messages of the contract to what the engine and jobs understand, and back.

#ifndef CERTIQ_RPC_CONVERT_H_
#define CERTIQ_RPC_CONVERT_H_

#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "certiq/v1/certificate.pb.h"
#include "certiq/v1/quantization_service.pb.h"
#include "certiq/v1/spec.pb.h"
#include "engine/quantize_layer.h"
#include "engine/run_context.h"
#include "engine/spec.h"
#include "jobs/layer_intake.h"

namespace certiq::rpc {

// A header that was understood; sizes are checked by LayerIntake.
struct QuantizeCall {
  std::string request_id;
  std::string layer_name;
  jobs::LayerRequest layer;
};

// INVALID_ARGUMENT or UNIMPLEMENTED naming the field, what was expected and what came.
absl::StatusOr<QuantizeCall> FromProto(const v1::QuantizeHeader& header);
// The same for the spec alone, values of enums and oneofs only: engine::ResolveSpec checks the
// rest.
absl::StatusOr<engine::QuantizationSpec> FromProto(const v1::QuantizationSpec& spec);

v1::Phase ToProto(engine::Phase phase);
v1::DataType ToProto(engine::DType dtype);

// What the certificate tells about the call and the engine does not know.
struct CallFacts {
  std::string weights_sha256;
  std::string x_sha256;
  std::string x_quantized_sha256;
  double held_out_fraction = 0;
  int64_t held_out_block_rows = 0;
  double receive_seconds = 0;
  double queue_seconds = 0;
};

// Rows whose error and bound go into one message: 1 MiB of them.
inline constexpr int64_t kCertificateRows = 65536;

// The certificate in messages that merge, in order, into the whole.
std::vector<v1::Certificate> ToProto(const engine::LayerCertificate& certificate,
                                     const CallFacts& facts,
                                     int64_t rows_per_message = kCertificateRows);

v1::ResultHeader ToProto(const std::vector<engine::ResultTensor>& tensors);

}  // namespace certiq::rpc

#endif  // CERTIQ_RPC_CONVERT_H_
