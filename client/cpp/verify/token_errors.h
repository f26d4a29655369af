// Output errors of a quantized layer on tokens, by definition: without sums, without a factor.
#ifndef CERTIQ_CLIENT_CPP_VERIFY_TOKEN_ERRORS_H_
#define CERTIQ_CLIENT_CPP_VERIFY_TOKEN_ERRORS_H_

#include "layer.h"
#include "matrix.h"

namespace certiq::verify {

// One entry a row of W.
struct OutputErrors {
  // |X w|^2.
  Vector energy;
  // |X w - X~ q|^2.
  Vector squared;
  // max over tokens of |X w - X~ q|.
  Vector largest;
  // Mismatched inputs, else empty: |P w|^2 with P = X - X~, and X~^T P w [R, N].
  Vector residual;
  Matrix residual_products;
};

// `q` [R, N] are the quantized weights. `with_residual` asks for the last two. 4 m R N flops.
OutputErrors ErrorsOn(const Tokens& tokens, const Matrix& w, const Matrix& q, bool with_residual);

// sqrt(squared / energy); 0 where both are 0.
double Relative(double squared, double energy);

// Plain rounding of live_w on the grid, codes from `low` to `high`: the levels [R, N].
Matrix RoundPlainly(const Layer& layer, int32_t low, int32_t high);

}  // namespace certiq::verify

#endif  // CERTIQ_CLIENT_CPP_VERIFY_TOKEN_ERRORS_H_
