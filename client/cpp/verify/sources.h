// Inputs of a verification: the raw tensors of a layer and the stored result.
#ifndef CERTIQ_CLIENT_CPP_VERIFY_SOURCES_H_
#define CERTIQ_CLIENT_CPP_VERIFY_SOURCES_H_

#include <functional>
#include <optional>
#include <string>

#include "absl/status/statusor.h"
#include "certiq/tensor.h"

namespace certiq::verify {

// A tensor of the result by its role; NOT_FOUND where there is none.
using TensorByRole = std::function<absl::StatusOr<TensorView>(const std::string& role)>;

// The bytes behind the views must outlive the verification.
struct Sources {
  // W [R, N].
  TensorView weight;
  // X [m, N], and X~ of the same shape where inputs are mismatched.
  TensorView x;
  std::optional<TensorView> x_quantized;
  // The one stream under which all of the activations went into a calibration: its name decided
  // which of them were held out. Unset where they came with the call.
  std::optional<std::string> stream_id;
  TensorByRole result;
};

}  // namespace certiq::verify

#endif  // CERTIQ_CLIENT_CPP_VERIFY_SOURCES_H_
