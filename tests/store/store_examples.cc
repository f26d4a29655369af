#include "store/store_examples.h"

#include <gtest/gtest.h>
#include <stdlib.h>  // NOLINT(modernize-deprecated-headers): mkdtemp

#include <algorithm>
#include <fstream>
#include <iterator>
#include <limits>
#include <memory>
#include <random>

namespace certiq::server::testing {
namespace {

// NUL bytes, quotes, what looks like SQL, and bytes that are no UTF-8.
std::string Nasty(const std::string& text) {
  return text + std::string("\0'\"`;--%?1 \xff\xc0\x80\xed\xa0\x80\n\0", 19);
}

}  // namespace

TemporaryDirectory::TemporaryDirectory() {
  std::string name = ::testing::TempDir() + "certiq_store_XXXXXX";
  if (mkdtemp(name.data()) == nullptr) ADD_FAILURE() << "no directory " << name;
  path_ = name;
}

TemporaryDirectory::~TemporaryDirectory() {
  std::error_code error;
  std::filesystem::remove_all(path_, error);
}

CalibrationRecord FullCalibration(const std::string& id) {
  CalibrationRecord record;
  record.id = id;
  record.tenant = Nasty("tenant");
  record.request_id = Nasty("request");
  record.request_digest = "digest";
  record.features = 4096;
  record.mismatched = true;
  record.held_out_fraction = 0.1;
  record.held_out_block_rows = 64;
  record.labels = {"", Nasty("label"), "same", "same"};
  record.create_time = std::numeric_limits<int64_t>::min();
  record.update_time = std::numeric_limits<int64_t>::max();
  record.ttl_micros = 86'400'000'000;
  record.finalize_time = 1'700'000'000'000'001;
  record.tokens = (int64_t{1} << 53) + 1;
  record.held_out_tokens = -1;
  record.sums = {"0123456789abcdef0123456789abcdef", 77};
  record.sums_sha256 = "sums' sha256";
  record.streams = {{"zeta", 5, 10'240, false}, {Nasty("alpha"), 1, 7, true}, {"", 0, 0, false}};
  return record;
}

JobRecord FullJob(const std::string& id, int64_t number) {
  JobRecord record;
  record.id = id;
  record.tenant = Nasty("tenant");
  record.request_id = Nasty("request");
  record.request_digest = "digest";
  record.number = number;
  record.layer_name = Nasty("layer");
  record.calibration_id = "calibration";
  record.spec = Nasty("spec");
  record.rows = 11;
  record.features = 12;
  record.weight_dtype = 3;
  record.weights_sha256 = "weights' sha256";
  record.weights = {"weights", 13};
  record.priority = std::numeric_limits<int32_t>::min();
  record.create_time = 14;
  record.start_time = 15;
  record.end_time = 16;
  record.deadline_time = std::numeric_limits<int64_t>::max();
  record.ttl_micros = std::numeric_limits<int64_t>::min();
  record.state = JobState::kExpired;
  record.starts = std::numeric_limits<int32_t>::max();
  record.error = Nasty("error");
  record.result = {"result", std::numeric_limits<int64_t>::max()};
  record.result_tensor_bytes = 17;
  record.result_header = std::string("\0\0", 2);
  record.relative_error = std::numeric_limits<double>::denorm_min();
  record.lambda_used = -1.0 / 3;
  return record;
}

std::vector<std::byte> Pattern(const std::string& seed, int64_t bytes) {
  std::seed_seq sequence(seed.begin(), seed.end());
  std::mt19937_64 random(sequence);
  std::vector<std::byte> pattern(static_cast<size_t>(bytes));
  for (std::byte& byte : pattern) byte = static_cast<std::byte>(random() >> 32);
  return pattern;
}

absl::StatusOr<BlobRef> WriteBlob(Store& store, std::span<const std::byte> bytes) {
  absl::StatusOr<std::unique_ptr<BlobWriter>> writer = store.CreateBlob();
  if (!writer.ok()) return writer.status();
  for (size_t piece = 1; !bytes.empty(); piece = piece * 7 + 3) {
    const size_t count = std::min(piece, bytes.size());
    if (absl::Status status = (*writer)->Append(bytes.first(count)); !status.ok()) return status;
    bytes = bytes.subspan(count);
  }
  return (*writer)->Commit();
}

absl::StatusOr<std::vector<std::byte>> ReadBlob(Store& store, const BlobRef& blob) {
  absl::StatusOr<std::unique_ptr<BlobReader>> reader = store.OpenBlob(blob);
  if (!reader.ok()) return reader.status();
  EXPECT_EQ((*reader)->bytes(), blob.bytes);
  std::vector<std::byte> bytes(static_cast<size_t>(blob.bytes));
  if (absl::Status status = (*reader)->Read(0, bytes); !status.ok()) return status;
  return bytes;
}

std::vector<std::string> NamesIn(const std::filesystem::path& directory) {
  std::vector<std::string> names;
  for (const auto& entry : std::filesystem::directory_iterator(directory)) {
    names.push_back(entry.path().filename().string());
  }
  std::sort(names.begin(), names.end());
  return names;
}

std::string ReadFile(const std::filesystem::path& file) {
  std::ifstream stream(file, std::ios::binary);
  EXPECT_TRUE(stream.is_open()) << file;
  return {std::istreambuf_iterator<char>(stream), {}};
}

void WriteFile(const std::filesystem::path& file, const std::string& bytes) {
  std::ofstream stream(file, std::ios::binary | std::ios::trunc);
  stream << bytes;
  stream.close();
  EXPECT_TRUE(stream.good()) << file;
}

}  // namespace certiq::server::testing
