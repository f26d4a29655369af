#include "job/result.h"

#include <algorithm>
#include <utility>

#include "absl/strings/str_cat.h"
#include "base/status_macros.h"

namespace certiq::server {
namespace {

// The certificate's parts, each after its length (uint32, little-endian).
std::string CertificateBytes(const engine::LayerCertificate& certificate,
                             const CertificateFacts& facts) {
  std::string bytes;
  for (const v1::Certificate& part : ToProto(certificate, facts)) {
    const std::string body = part.SerializeAsString();
    const auto length = static_cast<uint32_t>(body.size());
    bytes.append(reinterpret_cast<const char*>(&length), sizeof(length));
    bytes += body;
  }
  return bytes;
}

// Consecutive pieces of memory as one blob.
class PiecesReader final : public BlobReader {
 public:
  PiecesReader(engine::QuantizedLayer layer, std::string certificate)
      : layer_(std::move(layer)), certificate_(std::move(certificate)) {
    for (const engine::ResultTensor& tensor : layer_.tensors) Add(tensor.bytes);
    Add(std::as_bytes(std::span(certificate_)));
  }

  int64_t bytes() const override { return ends_.back(); }

  absl::Status Read(int64_t offset, std::span<std::byte> to) const override {
    auto piece =
        static_cast<size_t>(std::upper_bound(ends_.begin(), ends_.end(), offset) - ends_.begin());
    while (!to.empty()) {
      const auto size = static_cast<int64_t>(pieces_[piece].size());
      const auto begin = static_cast<size_t>(offset - (ends_[piece] - size));
      const size_t count = std::min(to.size(), pieces_[piece].size() - begin);
      std::copy_n(pieces_[piece].data() + begin, count, to.data());
      to = to.subspan(count);
      offset += static_cast<int64_t>(count);
      ++piece;
    }
    return absl::OkStatus();
  }

 private:
  void Add(std::span<const std::byte> piece) {
    pieces_.push_back(piece);
    ends_.push_back((ends_.empty() ? 0 : ends_.back()) + static_cast<int64_t>(piece.size()));
  }

  const engine::QuantizedLayer layer_;
  const std::string certificate_;
  std::vector<std::span<const std::byte>> pieces_;
  std::vector<int64_t> ends_;
};

}  // namespace

ResultRecord DescribeResult(const engine::QuantizedLayer& layer) {
  ResultRecord record;
  *record.mutable_header() = ToProto(layer.tensors);
  record.set_tensor_bytes(record.header().total_bytes());
  record.set_relative_error(layer.certificate.relative_error);
  record.set_lambda_used(layer.certificate.lambda_used);
  return record;
}

absl::StatusOr<ResultRecord> WriteResult(const engine::QuantizedLayer& layer,
                                         const CertificateFacts& facts, Blobs& blobs) {
  ASSIGN_OR_RETURN(const std::unique_ptr<BlobWriter> writer, blobs.Create());
  for (const engine::ResultTensor& tensor : layer.tensors) {
    RETURN_IF_ERROR(writer->Append(tensor.bytes));
  }
  const std::string certificate = CertificateBytes(layer.certificate, facts);
  RETURN_IF_ERROR(writer->Append(std::as_bytes(std::span(certificate))));
  ResultRecord record = DescribeResult(layer);
  ASSIGN_OR_RETURN(*record.mutable_blob(), writer->Commit());
  return record;
}

std::unique_ptr<BlobReader> MakeResultBlob(engine::QuantizedLayer layer,
                                           const CertificateFacts& facts) {
  std::string certificate = CertificateBytes(layer.certificate, facts);
  return std::make_unique<PiecesReader>(std::move(layer), std::move(certificate));
}

absl::Status ResultReader::Read(std::span<std::byte> to) {
  if (static_cast<int64_t>(to.size()) > blob_->bytes() - offset_) {
    return absl::DataLossError(
        absl::StrCat("the result in ", record_.blob().name(), " is cut off"));
  }
  RETURN_IF_ERROR(blob_->Read(offset_, to));
  offset_ += static_cast<int64_t>(to.size());
  return absl::OkStatus();
}

absl::Status ResultReader::ReadBytes(int64_t bytes, std::string& to) {
  to.resize(static_cast<size_t>(bytes));
  return Read(std::as_writable_bytes(std::span(to)));
}

absl::Status ResultReader::ReadCertificate(v1::Certificate& part) {
  uint32_t length = 0;
  RETURN_IF_ERROR(Read(std::as_writable_bytes(std::span(&length, 1))));
  // Compared before it is allocated: a damaged length may be anything.
  if (static_cast<int64_t>(length) > blob_->bytes() - offset_) {
    return absl::DataLossError(
        absl::StrCat("the result in ", record_.blob().name(), " is cut off"));
  }
  std::string body(length, '\0');
  RETURN_IF_ERROR(Read(std::as_writable_bytes(std::span(body))));
  if (part.ParseFromString(body)) return absl::OkStatus();
  return absl::DataLossError(
      absl::StrCat("the stored certificate in ", record_.blob().name(), " does not parse"));
}

}  // namespace certiq::server
