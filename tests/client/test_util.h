// Text assertions and example tensors of the client's tests.
#ifndef CERTIQ_TESTS_CLIENT_TEST_UTIL_H_
#define CERTIQ_TESTS_CLIENT_TEST_UTIL_H_

#include <cstdint>
#include <cstring>
#include <string>
#include <vector>

#include "absl/strings/match.h"
#include "absl/strings/string_view.h"
#include "certiq/client.h"
#include "certiq/tensor.h"
#include "gtest/gtest.h"

namespace certiq::testing {

inline ::testing::AssertionResult Contains(absl::string_view text, absl::string_view part) {
  if (absl::StrContains(text, part)) return ::testing::AssertionSuccess();
  return ::testing::AssertionFailure() << "no \"" << part << "\" in \"" << text << "\"";
}

// The bytes of a safetensors file with this header and as many bytes of data.
inline std::string SafetensorsBytes(const std::string& json, size_t data_bytes) {
  const uint64_t length = json.size();
  std::string bytes(sizeof(length), '\0');
  std::memcpy(bytes.data(), &length, sizeof(length));
  return bytes + json + std::string(data_bytes, 'd');
}

// A tensor whose rows differ.
inline OwnedTensor MakeTensor(const std::string& name, v1::DataType dtype,
                              const std::vector<int64_t>& shape) {
  const auto bytes = static_cast<size_t>(TensorBytes(dtype, shape).value());
  OwnedTensor tensor{name, dtype, shape, std::string(bytes, '\0')};
  for (size_t i = 0; i < bytes; ++i) tensor.data[i] = static_cast<char>((i * 31 + i / 251) % 127);
  return tensor;
}

// A layer that owns its bytes; Request() points into it.
struct Layer {
  OwnedTensor weight;
  OwnedTensor x;
  OwnedTensor x_quantized;

  QuantizeRequestData Request() const {
    QuantizeRequestData request;
    request.request_id = "request";
    request.layer_name = weight.name;
    request.weight = weight.View();
    request.x = x.View();
    return request;
  }
};

inline Layer MakeLayer(int64_t rows, int64_t features, int64_t tokens) {
  return {MakeTensor("l.weight", v1::DATA_TYPE_F32, {rows, features}),
          MakeTensor("l.x", v1::DATA_TYPE_F16, {tokens, features}),
          MakeTensor("l.x_quantized", v1::DATA_TYPE_F32, {tokens, features})};
}

}  // namespace certiq::testing

#endif  // CERTIQ_TESTS_CLIENT_TEST_UTIL_H_
