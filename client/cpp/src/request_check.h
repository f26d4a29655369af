// Checks of a request that need no server, and the header that announces it.
#ifndef CERTIQ_CLIENT_CPP_SRC_REQUEST_CHECK_H_
#define CERTIQ_CLIENT_CPP_SRC_REQUEST_CHECK_H_

#include <cstdint>
#include <optional>

#include "absl/status/status.h"
#include "certiq/client.h"
#include "certiq/v1/quantization_service.pb.h"

namespace certiq {

// What the server takes in one message, less room for the frame around the bytes.
inline constexpr int64_t kMaxRowBytes = (int64_t{16} << 20) - 4096;

// Weights [R, N] of a floating dtype whose bytes fit the shape and whose rows fit messages;
// INVALID_ARGUMENT otherwise, naming the field as the contract's headers do.
absl::Status CheckWeight(const TensorView& weight);

// Activations [m, N], X~ of the same shape, whose rows fit messages together; errors likewise.
absl::Status CheckActivations(const TensorView& x, const std::optional<TensorView>& x_quantized);

v1::TensorHeader HeaderOf(const TensorView& tensor);

// INVALID_ARGUMENT, naming the field as in QuantizeHeader and both sides of a mismatch. After OK
// every size of the request fits its shape, and rows fit messages.
absl::Status CheckRequest(const QuantizeRequestData& request);

// REQUIRES: CheckRequest(request).ok().
v1::QuantizeHeader MakeHeader(const QuantizeRequestData& request);

// Tensor bytes in all. REQUIRES: CheckRequest(request).ok().
int64_t UploadBytes(const QuantizeRequestData& request);

}  // namespace certiq

#endif  // CERTIQ_CLIENT_CPP_SRC_REQUEST_CHECK_H_
