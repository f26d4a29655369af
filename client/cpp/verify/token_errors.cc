#include "token_errors.h"

#include <cmath>

#include "linear_algebra.h"

namespace certiq::verify {
namespace {

// Rows of W at a time: with 4,096 tokens their outputs take 4 MiB.
constexpr int64_t kRows = 128;

}  // namespace

OutputErrors ErrorsOn(const Tokens& tokens, const Matrix& w, const Matrix& q, bool with_residual) {
  const bool mismatched = tokens.x_quantized.has_value();
  OutputErrors errors;
  errors.energy.resize(w.rows());
  errors.squared.resize(w.rows());
  errors.largest.resize(w.rows());
  if (mismatched && with_residual) {
    errors.residual.resize(w.rows());
    errors.residual_products.resize(w.rows(), w.cols());
  }
  InPieces(w.rows(), kRows, [&](int64_t begin, int64_t end) {
    const int64_t count = end - begin;
    // [rows, tokens].
    const Matrix wanted = w.middleRows(begin, count) * tokens.x.transpose();
    Matrix error;
    if (mismatched) {
      error = wanted - q.middleRows(begin, count) * tokens.x_quantized->transpose();
    } else {
      // W - Q first: the difference keeps digits that a difference of products loses.
      error = (w.middleRows(begin, count) - q.middleRows(begin, count)) * tokens.x.transpose();
    }
    errors.energy.segment(begin, count) = wanted.rowwise().squaredNorm();
    errors.squared.segment(begin, count) = error.rowwise().squaredNorm();
    for (int64_t r = 0; r < count; ++r) {
      errors.largest[begin + r] = error.cols() == 0 ? 0 : error.row(r).cwiseAbs().maxCoeff();
    }
    if (!mismatched || !with_residual) return;
    const Matrix residual =
        w.middleRows(begin, count) * (tokens.x - *tokens.x_quantized).transpose();
    errors.residual.segment(begin, count) = residual.rowwise().squaredNorm();
    errors.residual_products.middleRows(begin, count) = residual * *tokens.x_quantized;
  });
  return errors;
}

double Relative(double squared, double energy) {
  return squared == 0 ? 0 : std::sqrt(squared / energy);
}

Matrix RoundPlainly(const Layer& layer, int32_t low, int32_t high) {
  Matrix levels(layer.w.rows(), layer.w.cols());
  InPieces(levels.rows(), kRows, [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r) {
      for (int64_t j = 0; j < levels.cols(); ++j) {
        const auto value = static_cast<float>(layer.live_w(r, j));
        levels(r, j) =
            static_cast<double>(layer.q.Level(r, j, layer.q.NearestCode(r, j, value, low, high)));
      }
    }
  });
  return levels;
}

}  // namespace certiq::verify
