// Decoded layer: weights, tokens to fit and held out, quantized weights, Gram matrix.
#ifndef CERTIQ_CLIENT_CPP_VERIFY_LAYER_H_
#define CERTIQ_CLIENT_CPP_VERIFY_LAYER_H_

#include <cstdint>
#include <optional>
#include <vector>

#include "absl/status/statusor.h"
#include "certiq/v1/certificate.pb.h"
#include "matrix.h"
#include "quantized.h"
#include "sources.h"

namespace certiq::verify {

// Rows of X and, where inputs are mismatched, of X~; otherwise X~ = X and is not held twice.
struct Tokens {
  Matrix x;
  std::optional<Matrix> x_quantized;

  const Matrix& inputs() const { return x_quantized.has_value() ? *x_quantized : x; }
};

// All members but `order` are in the original order of features.
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
  // Whether the rule chose lambda by held-out tokens (V2); the final fit then has all tokens.
  bool held_out_damping = false;
};

// Decodes, splits and unpacks. INVALID_ARGUMENT naming what does not fit together.
absl::StatusOr<Layer> LoadLayer(const Sources& sources, const v1::Certificate& certificate);

}  // namespace certiq::verify

#endif  // CERTIQ_CLIENT_CPP_VERIFY_LAYER_H_
