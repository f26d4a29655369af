// Small things the client's tests share.
#ifndef CERTIQ_TESTS_CLIENT_TEST_UTIL_H_
#define CERTIQ_TESTS_CLIENT_TEST_UTIL_H_

#include <unistd.h>

#include <cstdint>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <regex>
#include <set>
#include <string>
#include <vector>

#include "absl/strings/match.h"
#include "absl/strings/string_view.h"
#include "certiq/client.h"
#include "certiq/tensor.h"
#include "gtest/gtest.h"

namespace certiq::testing {

using Names = std::set<std::string>;

inline ::testing::AssertionResult Contains(absl::string_view text, absl::string_view part) {
  if (absl::StrContains(text, part)) return ::testing::AssertionSuccess();
  return ::testing::AssertionFailure() << "no \"" << part << "\" in \"" << text << "\"";
}

inline ::testing::AssertionResult Matches(absl::string_view text, const std::string& pattern) {
  if (std::regex_match(std::string(text), std::regex(pattern))) {
    return ::testing::AssertionSuccess();
  }
  return ::testing::AssertionFailure() << "\"" << text << "\" does not match " << pattern;
}

// A folder of its own, gone at the end.
class TemporaryFolder {
 public:
  TemporaryFolder() {
    std::string name = (std::filesystem::temp_directory_path() / "certiq-test-XXXXXX").string();
    path_ = mkdtemp(name.data()) == nullptr ? "" : name;
  }
  TemporaryFolder(const TemporaryFolder&) = delete;
  TemporaryFolder& operator=(const TemporaryFolder&) = delete;
  ~TemporaryFolder() {
    std::error_code ignored;
    std::filesystem::remove_all(path_, ignored);
  }

  std::string Path(const std::string& name) const { return path_ + "/" + name; }

  std::set<std::string> Names() const {
    std::set<std::string> names;
    for (const auto& entry : std::filesystem::directory_iterator(path_)) {
      names.insert(entry.path().filename().string());
    }
    return names;
  }

 private:
  std::string path_;
};

inline std::string ReadFile(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  return {std::istreambuf_iterator<char>(file), {}};
}

inline void WriteFile(const std::string& path, const std::string& content) {
  std::ofstream(path, std::ios::binary) << content;
}

// A safetensors file of this header and so many bytes of data.
inline std::string SafetensorsBytes(const std::string& json, size_t data_bytes) {
  const uint64_t length = json.size();
  std::string bytes(sizeof(length), '\0');
  std::memcpy(bytes.data(), &length, sizeof(length));
  return bytes + json + std::string(data_bytes, 'd');
}

// Bytes that tell rows apart.
inline OwnedTensor MakeTensor(const std::string& name, v1::DataType dtype,
                              const std::vector<int64_t>& shape) {
  const auto bytes = static_cast<size_t>(TensorBytes(dtype, shape).value());
  OwnedTensor tensor{name, dtype, shape, std::string(bytes, '\0')};
  for (size_t i = 0; i < bytes; ++i) tensor.data[i] = static_cast<char>((i * 31 + i / 251) % 127);
  return tensor;
}

// A layer with its own bytes; Request() points into it.
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
