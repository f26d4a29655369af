// The raw data of a layer, split and ready for the formulas.
#ifndef CERTIQ_CLIENT_CPP_VERIFY_LAYER_H_
#define CERTIQ_CLIENT_CPP_VERIFY_LAYER_H_

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "certiq/v1/certificate.pb.h"
#include "quantized.h"
#include "tensors.h"

namespace certiq::verify {

// Rows of X and, where inputs are mismatched, of X~; otherwise X~ = X and is not held twice.
struct Tokens {
  Matrix x;
  std::optional<Matrix> x_quantized;

  const Matrix& inputs() const { return x_quantized.has_value() ? *x_quantized : x; }
};

// Everything in the original order of features, but for `order`.
struct Layer {
  // W [R, N] as it came, and with zeros at dead features (D3).
  Matrix w;
  Matrix live_w;
  // The tokens of the final fit, and those held out.
  Tokens fit;
  Tokens held_out;
  Quantized q;
  // X~^T X~ over the fit.
  Matrix gram;
  // Zero columns of X~ over the fit.
  std::vector<bool> dead;
  // Element i: the feature worked on at step i (O1).
  std::vector<int64_t> order;
  // The rule chose lambda by held-out tokens: the fit then has all tokens.
  bool ladder = false;
};

// What the user has.
struct Sources {
  TensorView weight;
  TensorView x;
  std::optional<TensorView> x_quantized;
  // The one stream under which all of the activations went into a calibration: its name decided
  // which of them were held out. Unset where they came with the call.
  std::optional<std::string> stream_id;
  TensorByRole result;
};

// Decodes, splits and unpacks. INVALID_ARGUMENT naming what does not fit together.
absl::StatusOr<Layer> LoadLayer(const Sources& sources, const v1::Certificate& certificate);

}  // namespace certiq::verify

#endif  // CERTIQ_CLIENT_CPP_VERIFY_LAYER_H_
