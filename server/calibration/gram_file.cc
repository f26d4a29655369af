#include "calibration/gram_file.h"

#include <algorithm>
#include <vector>

namespace certiq::server {
namespace {

std::span<const std::byte> BytesOf(const double* values, int64_t count) {
  return std::as_bytes(std::span(values, static_cast<size_t>(count)));
}

absl::Status WriteTriangle(const engine::UpperPanels<double>& triangle, const ByteSink& sink) {
  for (int64_t i = 0; i < triangle.size(); ++i) {
    absl::Status written = sink(BytesOf(triangle.row(i), triangle.size() - i));
    if (!written.ok()) return written;
  }
  return absl::OkStatus();
}

// Consecutive float64 of a blob.
class Reader {
 public:
  Reader(const BlobReader& blob, int64_t offset) : blob_(blob), offset_(offset) {}

  absl::Status Fill(double* values, int64_t count) {
    const auto bytes = std::as_writable_bytes(std::span(values, static_cast<size_t>(count)));
    absl::Status read = blob_.Read(offset_, bytes);
    offset_ += static_cast<int64_t>(bytes.size());
    return read;
  }

 private:
  const BlobReader& blob_;
  int64_t offset_;
};

// Rows are short where the matrix is small or near its end: several come from one read.
constexpr int64_t kReadElements = int64_t{1} << 17;

absl::Status ReadTriangle(Reader& reader, engine::UpperPanels<double>& triangle) {
  const int64_t n = triangle.size();
  std::vector<double> values;
  for (int64_t i = 0; i < n;) {
    int64_t end = i;
    int64_t count = 0;
    while (end < n && (count == 0 || count + n - end <= kReadElements)) count += n - end++;
    values.resize(static_cast<size_t>(count));
    if (absl::Status read = reader.Fill(values.data(), count); !read.ok()) return read;
    const double* row = values.data();
    for (; i < end; row += n - i, ++i) std::copy_n(row, n - i, triangle.row(i));
  }
  return absl::OkStatus();
}

}  // namespace

int64_t StatisticsBlobBytes(int64_t features, bool mismatched) {
  const int64_t triangle = features * (features + 1) / 2 * 8;
  return mismatched ? 2 * triangle + features * features * 8 : triangle;
}

absl::Status WriteStatistics(const engine::Statistics& sums, const ByteSink& sink) {
  absl::Status written = WriteTriangle(sums.gram, sink);
  if (!written.ok() || !sums.mismatch.has_value()) return written;
  written = WriteTriangle(sums.mismatch->residual, sink);
  if (!written.ok()) return written;
  return sink(
      BytesOf(sums.mismatch->cross.data(), static_cast<int64_t>(sums.mismatch->cross.size())));
}

absl::StatusOr<engine::Statistics> ReadStatistics(const BlobReader& blob, int64_t offset,
                                                  int64_t features, bool mismatched) {
  Reader reader(blob, offset);
  engine::Statistics sums;
  sums.gram = engine::UpperPanels<double>(features);
  absl::Status read = ReadTriangle(reader, sums.gram);
  if (read.ok() && mismatched) {
    engine::MismatchSums& mismatch = sums.mismatch.emplace();
    mismatch.residual = engine::UpperPanels<double>(features);
    mismatch.cross.resize(static_cast<size_t>(features * features));
    read = ReadTriangle(reader, mismatch.residual);
    if (read.ok()) {
      read = reader.Fill(mismatch.cross.data(), static_cast<int64_t>(mismatch.cross.size()));
    }
  }
  if (!read.ok()) return read;
  return sums;
}

}  // namespace certiq::server
