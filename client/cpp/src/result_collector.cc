#include "result_collector.h"

#include <algorithm>
#include <set>
#include <string>
#include <utility>

#include "absl/strings/str_cat.h"
#include "google/protobuf/unknown_field_set.h"
#include "google/protobuf/util/message_differencer.h"

namespace certiq {
namespace {

constexpr int kMaxTensors = 64;
constexpr size_t kMaxNameBytes = 256;
constexpr size_t kMaxDimensions = 8;

template <typename... Parts>
absl::Status Broken(const Parts&... parts) {
  return absl::InternalError(absl::StrCat("the server's answer breaks the contract: ", parts...));
}

// a * b, or the largest value.
int64_t SaturatingProduct(int64_t a, int64_t b) {
  int64_t product = 0;
  return __builtin_mul_overflow(a, b, &product) ? INT64_MAX : product;
}

absl::Status WithoutPayload(const google::protobuf::Message& frame) {
  // A kind of frame of a newer contract may be skipped: what is required is checked at the end.
  if (!frame.GetReflection()->GetUnknownFields(frame).empty()) return absl::OkStatus();
  return Broken("frame: expected a payload, got none");
}

}  // namespace

ResultCollector::ResultCollector(int64_t rows, int64_t features)
    : rows_(rows), features_(features) {}

int64_t ResultCollector::MaxResultBytes(int64_t rows, int64_t features) {
  // Dense float32: 4 bytes a weight; scales and zeros of groups of at least 8 features: 8 bytes
  // for 8 weights, more where there are few features. Twice that leaves room for padding.
  const int64_t weights = SaturatingProduct(SaturatingProduct(rows, features), 10);
  const int64_t edges = SaturatingProduct(rows + features, 64);
  int64_t sum = 0;
  if (__builtin_add_overflow(weights, edges, &sum)) return INT64_MAX;
  return sum;
}

absl::Status ResultCollector::Add(const v1::QuantizeResponse& frame) {
  switch (frame.payload_case()) {
    case v1::QuantizeResponse::kProgress:
      return absl::OkStatus();
    case v1::QuantizeResponse::kResult:
      return AddHeader(frame.result());
    case v1::QuantizeResponse::kChunk:
      return AddChunk(frame.chunk());
    case v1::QuantizeResponse::kCertificate:
      return AddCertificate(frame.certificate());
    case v1::QuantizeResponse::PAYLOAD_NOT_SET:
      break;
  }
  return WithoutPayload(frame);
}

absl::Status ResultCollector::Add(const v1::ReadResultResponse& frame) {
  switch (frame.payload_case()) {
    case v1::ReadResultResponse::kResult:
      return AddHeader(frame.result());
    case v1::ReadResultResponse::kData:
      return AddBytes(frame.data());
    case v1::ReadResultResponse::kCertificate:
      return AddCertificate(frame.certificate());
    case v1::ReadResultResponse::PAYLOAD_NOT_SET:
      break;
  }
  return WithoutPayload(frame);
}

void ResultCollector::Resume() {
  header_came_ = false;
  certificate_started_ = false;
  certificate_bytes_ = 0;
  result_.certificate.Clear();
}

absl::Status ResultCollector::AddHeader(const v1::ResultHeader& header) {
  if (header_came_) return Broken("result: expected one header, got a second one");
  header_came_ = true;
  if (started_) {
    return google::protobuf::util::MessageDifferencer::Equals(header, header_)
               ? absl::OkStatus()
               : Broken("result: expected the header that came first, got another one");
  }
  started_ = true;
  header_ = header;
  if (header.tensors().empty() || header.tensors_size() > kMaxTensors) {
    return Broken("result.tensors: expected 1 to ", kMaxTensors, ", got ", header.tensors_size());
  }
  const int64_t limit = MaxResultBytes(rows_, features_);
  int64_t total = 0;
  std::set<std::string> names;
  for (const v1::TensorHeader& tensor : header.tensors()) {
    const std::string at =
        absl::StrCat("result tensor \"", tensor.name().substr(0, kMaxNameBytes), "\": ");
    if (tensor.name().empty() || tensor.name().size() > kMaxNameBytes ||
        !names.insert(tensor.name()).second) {
      return Broken(at, "expected a name of 1 to ", kMaxNameBytes, " bytes that occurs once");
    }
    const std::vector<int64_t> shape(tensor.shape().begin(), tensor.shape().end());
    if (shape.empty() || shape.size() > kMaxDimensions) {
      return Broken(at, "expected 1 to ", kMaxDimensions, " dimensions, got ", shape.size());
    }
    for (const int64_t dimension : shape) {
      if (dimension < 1) {
        return Broken(at, "expected dimensions of at least 1, got ", ShapeText(shape));
      }
    }
    const absl::StatusOr<int64_t> bytes = TensorBytes(tensor.dtype(), shape);
    if (!bytes.ok()) return Broken(at, bytes.status().message());
    if (tensor.name() == "weight" &&
        (shape != std::vector<int64_t>{rows_, features_} || !IsFloatingPoint(tensor.dtype()))) {
      return Broken(at, "expected floating point [", rows_, ", ", features_, "], got ",
                    DataTypeName(tensor.dtype()), " ", ShapeText(shape));
    }
    if (__builtin_add_overflow(total, *bytes, &total) || total > limit) {
      return Broken("result: expected at most ", limit, " bytes for weights [", rows_, ", ",
                    features_, "], got more with tensor \"", tensor.name(), "\" ",
                    ShapeText(shape));
    }
    row_bytes_.push_back(*bytes / shape[0]);
    expected_bytes_.push_back(*bytes);
    result_.tensors.push_back({tensor.name(), tensor.dtype(), shape, std::string()});
  }
  if (header.total_bytes() != total) {
    return Broken("result.total_bytes: expected ", total, ", the sum of its tensors, got ",
                  header.total_bytes());
  }
  for (size_t i = 0; i < result_.tensors.size(); ++i) {
    result_.tensors[i].data.reserve(static_cast<size_t>(expected_bytes_[i]));
  }
  return absl::OkStatus();
}

absl::Status ResultCollector::AddChunk(const v1::ResultChunk& chunk) {
  if (!header_came_) return Broken("chunk: expected the result header first");
  if (certificate_started_) return Broken("chunk: expected none after the certificate");
  if (chunk.tensor() < 0 || static_cast<size_t>(chunk.tensor()) >= result_.tensors.size()) {
    return Broken("chunk.tensor: expected an index below ", result_.tensors.size(), ", got ",
                  chunk.tensor());
  }
  const auto index = static_cast<size_t>(chunk.tensor());
  OwnedTensor& tensor = result_.tensors[index];
  const auto row_bytes = static_cast<uint64_t>(row_bytes_[index]);
  const std::string at = absl::StrCat("chunk of \"", tensor.name, "\": ");
  const uint64_t rows_so_far = tensor.data.size() / row_bytes;
  if (chunk.row_offset() < 0 || static_cast<uint64_t>(chunk.row_offset()) != rows_so_far) {
    return Broken(at, "row_offset: expected ", rows_so_far, ", got ", chunk.row_offset());
  }
  if (chunk.data().empty() || chunk.data().size() % row_bytes != 0) {
    return Broken(at, "data: expected whole rows of ", row_bytes, " bytes, got ",
                  chunk.data().size(), " bytes");
  }
  const uint64_t missing = static_cast<uint64_t>(expected_bytes_[index]) - tensor.data.size();
  if (chunk.data().size() > missing) {
    return Broken(at, "data: expected at most the ", missing, " bytes that are missing, got ",
                  chunk.data().size());
  }
  tensor.data += chunk.data();
  received_bytes_ += static_cast<int64_t>(chunk.data().size());
  return absl::OkStatus();
}

absl::Status ResultCollector::AddBytes(const v1::ResultBytes& bytes) {
  if (!header_came_) return Broken("data: expected the result header first");
  if (certificate_started_) return Broken("data: expected none after the certificate");
  if (bytes.byte_offset() != received_bytes_) {
    return Broken("data.byte_offset: expected ", received_bytes_, ", got ", bytes.byte_offset());
  }
  const auto missing = static_cast<uint64_t>(header_.total_bytes() - received_bytes_);
  if (bytes.data().empty() || bytes.data().size() > missing) {
    return Broken("data: expected 1 to ", missing, " bytes, got ", bytes.data().size());
  }
  absl::string_view rest = bytes.data();
  while (!rest.empty()) {
    const size_t index = FirstIncomplete();
    std::string& data = result_.tensors[index].data;
    const auto room = static_cast<size_t>(expected_bytes_[index]) - data.size();
    data.append(rest.data(), std::min(room, rest.size()));
    rest.remove_prefix(std::min(room, rest.size()));
  }
  received_bytes_ += static_cast<int64_t>(bytes.data().size());
  return absl::OkStatus();
}

absl::Status ResultCollector::AddCertificate(const v1::Certificate& certificate) {
  if (!header_came_) return Broken("certificate: expected the result header first");
  if (const size_t index = FirstIncomplete(); index < result_.tensors.size()) {
    return Broken("certificate: expected every row of \"", result_.tensors[index].name, "\" first");
  }
  certificate_started_ = true;
  certificate_bytes_ += certificate.ByteSizeLong();
  // Two numbers a row, and lists whose lengths the contract bounds.
  const int64_t limit = (int64_t{16} << 20) + 32 * rows_;
  if (certificate_bytes_ > static_cast<uint64_t>(limit)) {
    return Broken("certificate: expected at most ", limit, " bytes, got ", certificate_bytes_);
  }
  result_.certificate.MergeFrom(certificate);
  return absl::OkStatus();
}

size_t ResultCollector::FirstIncomplete() const {
  size_t index = 0;
  while (index < result_.tensors.size() &&
         result_.tensors[index].data.size() == static_cast<uint64_t>(expected_bytes_[index])) {
    ++index;
  }
  return index;
}

absl::StatusOr<QuantizeResult> ResultCollector::Finish() && {
  if (!header_came_) return absl::DataLossError("the server ended the call without a result");
  if (const size_t index = FirstIncomplete(); index < result_.tensors.size()) {
    const OwnedTensor& tensor = result_.tensors[index];
    return absl::DataLossError(absl::StrCat("the server ended the call within tensor \"",
                                            tensor.name, "\": expected ", expected_bytes_[index],
                                            " bytes, got ", tensor.data.size()));
  }
  if (!certificate_started_) {
    return absl::DataLossError("the server ended the call without a certificate");
  }
  const v1::Certificate& certificate = result_.certificate;
  if (certificate.rows() != rows_ || certificate.features() != features_) {
    return Broken("certificate: expected rows ", rows_, " and features ", features_, ", got ",
                  certificate.rows(), " and ", certificate.features());
  }
  return std::move(result_);
}

}  // namespace certiq
