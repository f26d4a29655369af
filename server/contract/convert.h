// Messages of the contract to what the engine and jobs understand, and back.

#ifndef CERTIQ_CONTRACT_CONVERT_H_
#define CERTIQ_CONTRACT_CONVERT_H_

#include <cstddef>
#include <cstdint>
#include <initializer_list>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "certiq/v1/certificate.pb.h"
#include "certiq/v1/quantization_service.pb.h"
#include "certiq/v1/spec.pb.h"
#include "engine/quantize_layer.h"
#include "engine/run_context.h"
#include "engine/spec.h"
#include "job/codec.h"
#include "job/layer_intake.h"

namespace certiq::server {

// A header that was understood; sizes are checked by LayerIntake.
struct QuantizeCall {
  std::string request_id;
  std::string layer_name;
  // Empty, or what the layer has instead of activations.
  std::string calibration_id;
  LayerRequest layer;
};

// INVALID_ARGUMENT or UNIMPLEMENTED naming the field, what was expected and what came.
absl::StatusOr<QuantizeCall> FromProto(const v1::QuantizeHeader& header);
// The same for the spec alone, values of enums and oneofs only: engine::ResolveSpec checks the
// rest.
absl::StatusOr<engine::QuantizationSpec> FromProto(const v1::QuantizationSpec& spec);

// The settings as decided; an explicit grid stays out.
v1::QuantizationSpec ToProto(const engine::ResolvedSpec& spec);

// The first that is not OK.
absl::Status FirstError(std::initializer_list<absl::Status> statuses);

inline constexpr size_t kMaxRequestIdBytes = 128;
inline constexpr size_t kMaxNameBytes = 256;
// INVALID_ARGUMENT where the value is longer.
absl::Status CheckName(absl::string_view field, absl::string_view value, size_t limit);

// What a matrix header announces.
struct MatrixShape {
  int64_t rows = 0;
  int64_t columns = 0;
  engine::DType dtype = engine::DType::kF32;
};
// `dimensions` says what they are: "[tokens, input features]".
absl::StatusOr<MatrixShape> ReadMatrix(bool has, const v1::TensorHeader& header,
                                       absl::string_view field, absl::string_view dimensions);

v1::Phase ToProto(engine::Phase phase);
v1::DataType ToProto(engine::DType dtype);

// Rows whose error and bound go into one message: 1 MiB of them.
inline constexpr int64_t kCertificateRows = 65536;

// The certificate in messages that merge, in order, into the whole.
std::vector<v1::Certificate> ToProto(const engine::LayerCertificate& certificate,
                                     const CallFacts& facts,
                                     int64_t rows_per_message = kCertificateRows);

v1::ResultHeader ToProto(const std::vector<engine::ResultTensor>& tensors);

}  // namespace certiq::server

#endif  // CERTIQ_CONTRACT_CONVERT_H_
