#include "store/store_examples.h"

#include <gtest/gtest.h>
#include <stdlib.h>  // NOLINT(modernize-deprecated-headers): mkdtemp
#include <unistd.h>

#include <algorithm>
#include <cstdlib>
#include <fstream>
#include <iterator>
#include <limits>
#include <memory>
#include <random>
#include <set>
#include <system_error>

#include "base/status.h"
#include "contract/rpc_status.h"

namespace certiq::server::testing {
namespace {

// NUL bytes, quotes, what looks like SQL, and characters of two and four bytes.
std::string Nasty(const std::string& text) {
  return text + std::string("\0'\"`;--%?1 \xc3\xbf\xf4\x8f\xbf\xbf\n\0", 19);
}

// In memory where there is room: no test asks what a machine's failure leaves, and syncing a disk
// takes most of the time of those that fail at every operation in turn.
std::string TemporaryRoot() {
  constexpr std::uintmax_t kRoom = std::uintmax_t{1} << 30;
  const std::string shared_memory = "/dev/shm/";
  std::error_code error;
  const auto space = std::filesystem::space(shared_memory, error);
  const bool fits = !error && space.available >= kRoom && access(shared_memory.c_str(), W_OK) == 0;
  return fits && ::testing::TempDir() == "/tmp/" ? shared_memory : ::testing::TempDir();
}

}  // namespace

TemporaryDirectory::TemporaryDirectory() {
  std::string name = TemporaryRoot() + "certiq_store_XXXXXX";
  if (mkdtemp(name.data()) == nullptr) ADD_FAILURE() << "no directory " << name;
  path_ = name;
}

TemporaryDirectory::~TemporaryDirectory() {
  std::error_code error;
  std::filesystem::remove_all(path_, error);
}

CalibrationRecord FullCalibration(const std::string& id) {
  CalibrationRecord record = OpenCalibration(id);
  // Times that a sum with ttl_micros just fits.
  record.set_update_time(std::numeric_limits<int64_t>::max() - record.ttl_micros());
  record.set_finalize_time(1'700'000'000'000'001);
  record.set_tokens((int64_t{1} << 53) + 1);
  record.set_held_out_tokens(-1);
  *record.mutable_sums() = MakeBlobRef("0123456789abcdef0123456789abcdef", 77);
  record.set_sums_sha256("sums' sha256");
  *record.add_streams() = MakeStream("zeta", 5, 10'240, false);
  *record.add_streams() = MakeStream(Nasty("alpha"), 1, 7, true);
  *record.add_streams() = MakeStream("", 0, 0, false);
  return record;
}

JobRecord FullJob(const std::string& id, int64_t number) {
  JobRecord record = QueuedJob(id);
  record.set_number(number);
  record.set_priority(std::numeric_limits<int32_t>::min());
  record.set_start_time(15);
  record.set_end_time(16);
  record.set_deadline_time(std::numeric_limits<int64_t>::max());
  record.set_ttl_micros(std::numeric_limits<int64_t>::min());
  record.set_state(v1::JOB_STATE_EXPIRED);
  record.set_starts(std::numeric_limits<int32_t>::max());
  absl::Status error = absl::UnavailableError(Nasty("error"));
  base::SetRetryAfter(error, base::kRetrySoon);
  *record.mutable_error() = ToRpcStatus(error);
  ResultRecord& result = *record.mutable_result();
  *result.mutable_blob() = MakeBlobRef("result", std::numeric_limits<int64_t>::max());
  result.set_tensor_bytes(17);
  result.mutable_header()->set_total_bytes(18);
  result.mutable_header()->add_tensors()->set_name(Nasty("tensor"));
  result.set_relative_error(std::numeric_limits<double>::denorm_min());
  result.set_lambda_used(-1.0 / 3);
  record.set_owner(Nasty("owner"));
  record.set_claim(Nasty("claim"));
  record.set_cancel_code(std::numeric_limits<int32_t>::max());
  return record;
}

CalibrationRecord OpenCalibration(const std::string& id) {
  CalibrationRecord record;
  record.set_id(id);
  record.set_tenant(Nasty("tenant"));
  record.set_request_id(Nasty("request of " + id));
  record.set_request_digest("digest");
  record.set_features(4096);
  record.set_mismatched(true);
  record.set_held_out_fraction(0.1);
  record.set_held_out_block_rows(64);
  record.add_labels("");
  record.add_labels(Nasty("label"));
  record.add_labels("same");
  record.add_labels("same");
  record.set_create_time(std::numeric_limits<int64_t>::min());
  record.set_update_time(record.create_time());
  record.set_ttl_micros(86'400'000'000);
  return record;
}

JobRecord QueuedJob(const std::string& id) {
  JobRecord record;
  record.set_id(id);
  record.set_tenant(Nasty("tenant"));
  record.set_request_id(Nasty("request of " + id));
  record.set_request_digest("digest");
  record.set_layer_name(Nasty("layer"));
  record.set_calibration_id("calibration");
  record.mutable_spec()->set_bits(3);
  record.mutable_spec()->set_seed(std::numeric_limits<uint64_t>::max());
  record.set_rows(11);
  record.set_features(12);
  record.set_weight_dtype(v1::DATA_TYPE_BF16);
  record.set_weights_sha256("weights' sha256");
  *record.mutable_weights() = MakeBlobRef("weights", 13);
  record.set_create_time(14);
  record.set_ttl_micros(1'000'000);
  record.set_state(v1::JOB_STATE_QUEUED);
  return record;
}

BlobRef MakeBlobRef(const std::string& name, int64_t bytes) {
  BlobRef blob;
  blob.set_name(name);
  blob.set_bytes(bytes);
  return blob;
}

StreamRecord MakeStream(const std::string& id, int64_t sequence, int64_t tokens, bool imported) {
  StreamRecord stream;
  stream.set_id(id);
  stream.set_sequence(sequence);
  stream.set_tokens(tokens);
  stream.set_imported(imported);
  return stream;
}

::testing::AssertionResult Same(const google::protobuf::Message& a,
                                const google::protobuf::Message& b) {
  if (a.SerializeAsString() == b.SerializeAsString()) return ::testing::AssertionSuccess();
  return ::testing::AssertionFailure() << a.ShortDebugString() << "\nis not\n"
                                       << b.ShortDebugString() << "\n";
}

std::vector<std::byte> Pattern(const std::string& seed, int64_t bytes) {
  std::seed_seq sequence(seed.begin(), seed.end());
  std::mt19937_64 random(sequence);
  std::vector<std::byte> pattern(static_cast<size_t>(bytes));
  for (std::byte& byte : pattern) byte = static_cast<std::byte>(random() >> 32);
  return pattern;
}

absl::StatusOr<BlobRef> WriteBlob(Blobs& blobs, std::span<const std::byte> bytes) {
  absl::StatusOr<std::unique_ptr<BlobWriter>> writer = blobs.Create();
  if (!writer.ok()) return writer.status();
  for (size_t piece = 1; !bytes.empty(); piece = piece * 7 + 3) {
    const size_t count = std::min(piece, bytes.size());
    if (absl::Status status = (*writer)->Append(bytes.first(count)); !status.ok()) return status;
    bytes = bytes.subspan(count);
  }
  return (*writer)->Commit();
}

absl::StatusOr<std::vector<std::byte>> ReadBlob(Blobs& blobs, const BlobRef& blob) {
  absl::StatusOr<std::unique_ptr<BlobReader>> reader = blobs.Open(blob);
  if (!reader.ok()) return reader.status();
  EXPECT_EQ((*reader)->bytes(), blob.bytes());
  std::vector<std::byte> bytes(static_cast<size_t>(blob.bytes()));
  if (absl::Status status = (*reader)->Read(0, bytes); !status.ok()) return status;
  return bytes;
}

absl::StatusOr<StoredState> RegisterReplica(Catalog& catalog, const std::string& replica,
                                            base::UnixMicros now) {
  StoredState state;
  const absl::Status status = catalog.Register(
      replica, now, [&](const CalibrationRecord& record) { state.calibrations.push_back(record); },
      [&](const JobRecord& record) { state.jobs.push_back(record); });
  if (!status.ok()) return status;
  return state;
}

absl::StatusOr<StoredState> StartUp(const Storage& storage, const std::string& replica,
                                    base::UnixMicros now) {
  absl::StatusOr<StoredState> state = RegisterReplica(*storage.catalog, replica, now);
  if (!state.ok()) return state;
  std::set<std::string> named;
  for (const CalibrationRecord& record : state->calibrations) named.insert(record.sums().name());
  for (const JobRecord& record : state->jobs) {
    named.insert(record.weights().name());
    named.insert(record.result().blob().name());
  }
  const absl::Status status = storage.blobs->RemoveAllBut(named);
  if (!status.ok()) return status;
  return state;
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
