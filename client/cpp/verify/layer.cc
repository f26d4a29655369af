#include "layer.h"

#include <algorithm>
#include <cmath>
#include <numeric>
#include <utility>

#include "absl/status/status.h"
#include "absl/strings/str_cat.h"
#include "base/status_macros.h"
#include "held_out_split.h"
#include "linear_algebra.h"
#include "tensors.h"

namespace certiq::verify {
namespace {

// The rows of a [m, N] tensor whose mark is `wanted`. INVALID_ARGUMENT for a value that is not
// finite.
absl::StatusOr<Matrix> DecodeRows(const TensorView& tensor, const std::vector<bool>& marks,
                                  bool wanted) {
  const int64_t columns = tensor.shape[1];
  Matrix result(std::count(marks.begin(), marks.end(), wanted), columns);
  std::vector<float> row(static_cast<size_t>(columns));
  int64_t to = 0;
  for (size_t r = 0; r < marks.size(); ++r) {
    if (marks[r] != wanted) continue;
    DecodeFloats(tensor, static_cast<int64_t>(r) * columns, columns, row.data());
    for (int64_t j = 0; j < columns; ++j) {
      const float value = row[static_cast<size_t>(j)];
      if (!std::isfinite(value)) {
        return absl::InvalidArgumentError(
            absl::StrCat(tensor.name, ": row ", r, ", column ", j, " is not finite in float32"));
      }
      result(to, j) = static_cast<double>(value);
    }
    ++to;
  }
  return result;
}

absl::StatusOr<Tokens> DecodeTokens(const Sources& sources, const std::vector<bool>& held_out,
                                    bool wanted) {
  Tokens tokens;
  ASSIGN_OR_RETURN(tokens.x, DecodeRows(sources.x, held_out, wanted));
  if (sources.x_quantized.has_value()) {
    ASSIGN_OR_RETURN(tokens.x_quantized, DecodeRows(*sources.x_quantized, held_out, wanted));
  }
  return tokens;
}

absl::Status ExpectMatrix(const TensorView& tensor) {
  if (tensor.shape.size() != 2 || tensor.shape[0] < 1 || tensor.shape[1] < 1) {
    return absl::InvalidArgumentError(absl::StrCat(
        tensor.name, ": expected two dimensions of at least 1, got ", ShapeText(tensor.shape)));
  }
  return ExpectTensor(tensor, tensor.dtype, tensor.shape);
}

absl::Status CheckShapes(const Sources& sources) {
  RETURN_IF_ERROR(ExpectMatrix(sources.weight));
  RETURN_IF_ERROR(ExpectMatrix(sources.x));
  if (sources.x.shape[1] != sources.weight.shape[1]) {
    return absl::InvalidArgumentError(
        absl::StrCat(sources.x.name, ": expected ", sources.weight.shape[1],
                     " features as the weights have, got ", sources.x.shape[1]));
  }
  if (!sources.x_quantized.has_value()) return absl::OkStatus();
  RETURN_IF_ERROR(ExpectMatrix(*sources.x_quantized));
  if (sources.x_quantized->shape != sources.x.shape) {
    return absl::InvalidArgumentError(
        absl::StrCat(sources.x_quantized->name, ": expected the shape of x, ",
                     ShapeText(sources.x.shape), ", got ", ShapeText(sources.x_quantized->shape)));
  }
  return absl::OkStatus();
}

// By decreasing norm of X~_j, ties in the original order. Dynamic groups are runs in that order:
// their index settles what the service's own sums, in which neighbours within 1e-6 may change
// places, made of it.
std::vector<int64_t> WorkingOrder(const v1::QuantizationSpec& spec, const Layer& layer) {
  std::vector<int64_t> order(static_cast<size_t>(layer.gram.rows()));
  std::iota(order.begin(), order.end(), int64_t{0});
  if (spec.order() != v1::ORDER_DECREASING_NORM) return order;
  const bool runs = spec.group_scales() == v1::GROUP_SCALES_DYNAMIC && spec.group_size() != 0;
  const auto group = [&](int64_t j) { return runs ? layer.q.group_of[static_cast<size_t>(j)] : 0; };
  std::stable_sort(order.begin(), order.end(), [&](int64_t a, int64_t b) {
    if (group(a) != group(b)) return group(a) < group(b);
    return layer.gram(a, a) > layer.gram(b, b);
  });
  return order;
}

}  // namespace

absl::StatusOr<Layer> LoadLayer(const Sources& sources, const v1::Certificate& certificate) {
  RETURN_IF_ERROR(CheckShapes(sources));
  const v1::QuantizationSpec& spec = certificate.spec();
  const double fraction = certificate.held_out_fraction();
  if (!(fraction >= 0 && fraction <= 0.5) ||
      (fraction > 0 && certificate.held_out_block_rows() < 1)) {
    return absl::InvalidArgumentError(absl::StrCat(
        "held_out_fraction, held_out_block_rows: expected 0 to 0.5 and at least 1, got ", fraction,
        " and ", certificate.held_out_block_rows()));
  }
  if (certificate.calibration_id().empty() && sources.stream_id.has_value()) {
    return absl::InvalidArgumentError(
        "stream: expected none, since the activations came with the call, by no calibration");
  }
  if (!certificate.calibration_id().empty() && fraction > 0 && !sources.stream_id.has_value()) {
    return absl::UnimplementedError(
        "the certificate is of a calibration that held tokens out, stream by stream: which ones "
        "cannot be told from the activations alone (--stream names the stream, where there was "
        "one)");
  }
  Layer layer;
  ASSIGN_OR_RETURN(layer.q, ReadQuantized(spec, sources.weight.shape[0], sources.weight.shape[1],
                                          sources.result));
  ASSIGN_OR_RETURN(
      layer.w, DecodeRows(sources.weight,
                          std::vector<bool>(static_cast<size_t>(sources.weight.shape[0])), false));

  const std::vector<bool> held = HeldOutRows(
      sources.x.shape[0], fraction, std::max<int64_t>(1, certificate.held_out_block_rows()),
      sources.stream_id.value_or(""));
  const bool any = std::find(held.begin(), held.end(), true) != held.end();
  layer.held_out_damping = any && spec.method() != v1::METHOD_NEAREST &&
                           spec.damping().rule_case() == v1::Damping::kHeldOut;
  ASSIGN_OR_RETURN(
      layer.fit,
      DecodeTokens(sources, layer.held_out_damping ? std::vector<bool>(held.size()) : held, false));
  ASSIGN_OR_RETURN(layer.held_out, DecodeTokens(sources, held, true));
  if (layer.fit.x.rows() == 0) {
    return absl::InvalidArgumentError("held_out_fraction: every row would be held out");
  }

  layer.gram = Gram(layer.fit.inputs());
  layer.live_w = layer.w;
  layer.dead.resize(static_cast<size_t>(layer.gram.rows()));
  for (int64_t j = 0; j < layer.gram.rows(); ++j) {
    layer.dead[static_cast<size_t>(j)] = layer.gram(j, j) == 0;
    if (layer.gram(j, j) == 0) layer.live_w.col(j).setZero();
  }
  layer.order = WorkingOrder(spec, layer);
  return layer;
}

}  // namespace certiq::verify
