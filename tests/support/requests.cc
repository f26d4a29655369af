#include "support/requests.h"

#include <algorithm>
#include <string>

namespace certiq::testing {
namespace {

std::string Text(std::span<const std::byte> bytes) {
  std::string text(bytes.size(), '\0');
  std::transform(bytes.begin(), bytes.end(), text.begin(),
                 [](std::byte b) { return static_cast<char>(b); });
  return text;
}

void Announce(int64_t rows, int64_t columns, const char* name, v1::TensorHeader& header) {
  header.set_name(name);
  header.set_dtype(v1::DATA_TYPE_F32);
  header.add_shape(rows);
  header.add_shape(columns);
}

}  // namespace

v1::QuantizeRequest HeaderFor(const Layer& layer) {
  v1::QuantizeRequest request;
  v1::QuantizeHeader& header = *request.mutable_header();
  header.set_request_id("test-request");
  header.set_layer_name("model.layers.0.test");
  Announce(layer.rows, layer.features, "weight", *header.mutable_weight());
  Announce(layer.tokens, layer.features, "x", *header.mutable_x());
  return request;
}

v1::QuantizeRequest WeightChunk(const Layer& layer, int64_t begin, int64_t end) {
  v1::QuantizeRequest request;
  request.mutable_weight()->set_row_offset(begin);
  request.mutable_weight()->set_data(Text(RowBytes(layer.weights, layer.features, begin, end)));
  return request;
}

v1::QuantizeRequest ActivationChunk(const Layer& layer, int64_t begin, int64_t end) {
  v1::QuantizeRequest request;
  request.mutable_activation()->set_row_offset(begin);
  request.mutable_activation()->set_x(Text(RowBytes(layer.x, layer.features, begin, end)));
  return request;
}

std::vector<v1::QuantizeRequest> QuantizeRequestsFor(const Layer& layer, int64_t rows) {
  std::vector<v1::QuantizeRequest> requests = {HeaderFor(layer)};
  for (int64_t r = 0; r < layer.rows; r += rows) {
    requests.push_back(WeightChunk(layer, r, std::min(layer.rows, r + rows)));
  }
  for (int64_t t = 0; t < layer.tokens; t += rows) {
    requests.push_back(ActivationChunk(layer, t, std::min(layer.tokens, t + rows)));
  }
  return requests;
}

}  // namespace certiq::testing
