#include "calibration/gram_file.h"

#include <algorithm>
#include <cstddef>
#include <functional>
#include <span>
#include <utility>
#include <vector>

#include "base/sha256.h"
#include "base/status_macros.h"

namespace certiq::server {
namespace {

// Takes bytes as they are made.
using ByteSink = std::function<absl::Status(std::span<const std::byte>)>;

std::span<const std::byte> BytesOf(const double* values, int64_t count) {
  return std::as_bytes(std::span(values, static_cast<size_t>(count)));
}

absl::Status WriteTriangle(const engine::UpperTriangle<double>& triangle, const ByteSink& sink) {
  for (int64_t i = 0; i < triangle.size(); ++i) {
    RETURN_IF_ERROR(sink(BytesOf(triangle.row(i), triangle.size() - i)));
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

absl::Status ReadTriangle(Reader& reader, engine::UpperTriangle<double>& triangle) {
  const int64_t n = triangle.size();
  std::vector<double> values;
  for (int64_t i = 0; i < n;) {
    int64_t end = i;
    int64_t count = 0;
    while (end < n && (count == 0 || count + n - end <= kReadElements)) count += n - end++;
    values.resize(static_cast<size_t>(count));
    RETURN_IF_ERROR(reader.Fill(values.data(), count));
    const double* row = values.data();
    for (; i < end; row += n - i, ++i) std::copy_n(row, n - i, triangle.row(i));
  }
  return absl::OkStatus();
}

absl::Status WriteStatistics(const engine::Statistics& sums, const ByteSink& sink) {
  RETURN_IF_ERROR(WriteTriangle(sums.gram, sink));
  if (!sums.mismatch.has_value()) return absl::OkStatus();
  RETURN_IF_ERROR(WriteTriangle(sums.mismatch->residual, sink));
  return sink(
      BytesOf(sums.mismatch->cross.data(), static_cast<int64_t>(sums.mismatch->cross.size())));
}

// The squares of massive tokens follow all sums, those of each portion in the same order, where any
// portion has some: N float64, and N of P where mismatched; zeros for a portion that has none.
bool HasMassive(const engine::Statistics& sums) {
  return !sums.massive_squares.empty() ||
         (sums.mismatch.has_value() && !sums.mismatch->massive_squares.empty());
}

absl::Status WriteMassive(const engine::Statistics& sums, const ByteSink& sink) {
  const auto write = [&](std::vector<double> squares) {
    squares.resize(static_cast<size_t>(sums.features()));
    return sink(BytesOf(squares.data(), sums.features()));
  };
  RETURN_IF_ERROR(write(sums.massive_squares));
  if (!sums.mismatch.has_value()) return absl::OkStatus();
  return write(sums.mismatch->massive_squares);
}

// Reads N squares, none where all are zero.
absl::Status ReadSquares(Reader& reader, int64_t features, std::vector<double>& squares) {
  squares.resize(static_cast<size_t>(features));
  RETURN_IF_ERROR(reader.Fill(squares.data(), features));
  if (std::all_of(squares.begin(), squares.end(), [](double square) { return square == 0; })) {
    squares.clear();
  }
  return absl::OkStatus();
}

absl::Status ReadMassive(Reader& reader, engine::Statistics& sums) {
  RETURN_IF_ERROR(ReadSquares(reader, sums.features(), sums.massive_squares));
  if (!sums.mismatch.has_value()) return absl::OkStatus();
  return ReadSquares(reader, sums.features(), sums.mismatch->massive_squares);
}

absl::StatusOr<engine::Statistics> ReadStatistics(const BlobReader& blob, int64_t offset,
                                                  int64_t features, bool mismatched) {
  Reader reader(blob, offset);
  engine::Statistics sums;
  sums.gram = engine::UpperTriangle<double>(features);
  RETURN_IF_ERROR(ReadTriangle(reader, sums.gram));
  if (!mismatched) return sums;
  engine::MismatchSums& mismatch = sums.mismatch.emplace();
  mismatch.residual = engine::UpperTriangle<double>(features);
  mismatch.cross.resize(static_cast<size_t>(features * features));
  RETURN_IF_ERROR(ReadTriangle(reader, mismatch.residual));
  RETURN_IF_ERROR(reader.Fill(mismatch.cross.data(), static_cast<int64_t>(mismatch.cross.size())));
  return sums;
}

}  // namespace

int64_t StatisticsBlobBytes(int64_t features, bool mismatched) {
  const int64_t triangle = features * (features + 1) / 2 * 8;
  return mismatched ? 2 * triangle + features * features * 8 : triangle;
}

int64_t SumsBytes(const CalibrationRecord& calibration) {
  return (calibration.held_out_fraction() > 0 ? 2 : 1) *
         StatisticsBlobBytes(calibration.features(), calibration.mismatched());
}

absl::StatusOr<StoredSums> WriteSums(Blobs& blobs, const engine::Statistics& fit,
                                     const engine::Statistics* held_out) {
  base::Sha256 digest;
  ASSIGN_OR_RETURN(const std::unique_ptr<BlobWriter> writer, blobs.Create());
  const ByteSink sink = [&](std::span<const std::byte> bytes) {
    digest.Update({reinterpret_cast<const char*>(bytes.data()), bytes.size()});
    return writer->Append(bytes);
  };
  RETURN_IF_ERROR(WriteStatistics(fit, sink));
  if (held_out != nullptr) RETURN_IF_ERROR(WriteStatistics(*held_out, sink));
  if (HasMassive(fit) || (held_out != nullptr && HasMassive(*held_out))) {
    RETURN_IF_ERROR(WriteMassive(fit, sink));
    if (held_out != nullptr) RETURN_IF_ERROR(WriteMassive(*held_out, sink));
  }
  StoredSums sums;
  ASSIGN_OR_RETURN(sums.blob, writer->Commit());
  sums.sha256 = digest.Finish();
  return sums;
}

absl::StatusOr<LoadedSums> ReadSums(Blobs& blobs, const CalibrationRecord& calibration) {
  ASSIGN_OR_RETURN(const std::unique_ptr<BlobReader> reader, blobs.Open(calibration.sums()));
  const int64_t features = calibration.features();
  const bool mismatched = calibration.mismatched();
  LoadedSums sums;
  ASSIGN_OR_RETURN(sums.fit, ReadStatistics(*reader, 0, features, mismatched));
  sums.fit.tokens = calibration.tokens();
  if (calibration.held_out_fraction() > 0) {
    ASSIGN_OR_RETURN(
        sums.held_out,
        ReadStatistics(*reader, StatisticsBlobBytes(features, mismatched), features, mismatched));
    sums.held_out->tokens = calibration.held_out_tokens();
  }
  if (const int64_t end = SumsBytes(calibration); end < reader->bytes()) {
    Reader massive(*reader, end);
    RETURN_IF_ERROR(ReadMassive(massive, sums.fit));
    if (sums.held_out.has_value()) RETURN_IF_ERROR(ReadMassive(massive, *sums.held_out));
  }
  return sums;
}

}  // namespace certiq::server
