// Directories, records and tensors for the tests of the store.

#ifndef CERTIQ_TESTS_STORE_STORE_EXAMPLES_H_
#define CERTIQ_TESTS_STORE_STORE_EXAMPLES_H_

#include <gtest/gtest.h>

#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <span>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "base/clock.h"
#include "google/protobuf/message.h"
#include "store/blobs.h"
#include "store/catalog.h"
#include "store/records.h"
#include "store/storage.h"

namespace certiq::server::testing {

// A directory of its own, removed on destruction.
class TemporaryDirectory {
 public:
  TemporaryDirectory();
  TemporaryDirectory(const TemporaryDirectory&) = delete;
  TemporaryDirectory& operator=(const TemporaryDirectory&) = delete;
  ~TemporaryDirectory();

  std::filesystem::path path() const { return path_; }
  // Where a store can be; not there yet.
  std::string data() const { return (path_ / "data").string(); }

 private:
  std::filesystem::path path_;
};

// Every field differs from its default, and from the other fields. The calibration is finalized and
// the job has ended, so that the job can be added as it is and a restart leaves both.
CalibrationRecord FullCalibration(const std::string& id);
JobRecord FullJob(const std::string& id, int64_t number);

// An open calibration without sums, and a queued job of "calibration": what a client makes first.
CalibrationRecord OpenCalibration(const std::string& id);
JobRecord QueuedJob(const std::string& id);

BlobRef MakeBlobRef(const std::string& name, int64_t bytes);
StreamRecord MakeStream(const std::string& id, int64_t sequence, int64_t tokens, bool imported);

// Whether two records agree in every byte; other than by MessageDifferencer, -0 is not 0 and NaN is
// itself.
::testing::AssertionResult Same(const google::protobuf::Message& a,
                                const google::protobuf::Message& b);
template <typename Record>
::testing::AssertionResult Same(const std::vector<Record>& a, const std::vector<Record>& b) {
  if (a.size() != b.size()) {
    return ::testing::AssertionFailure() << a.size() << " and " << b.size() << " records";
  }
  for (size_t i = 0; i < a.size(); ++i) {
    if (auto same = Same(a[i], b[i]); !same) return same << "record " << i;
  }
  return ::testing::AssertionSuccess();
}

// Bytes that follow from `seed`; no two MiB alike.
std::vector<std::byte> Pattern(const std::string& seed, int64_t bytes);

// In pieces of odd sizes.
absl::StatusOr<BlobRef> WriteBlob(Blobs& blobs, std::span<const std::byte> bytes);
absl::StatusOr<std::vector<std::byte>> ReadBlob(Blobs& blobs, const BlobRef& blob);

// What Register tells.
struct StoredState {
  std::vector<CalibrationRecord> calibrations;
  std::vector<JobRecord> jobs;
};
absl::StatusOr<StoredState> RegisterReplica(Catalog& catalog, const std::string& replica,
                                            base::UnixMicros now);
// A start of the server as Backend does it: registers, then removes the blobs that no record names.
absl::StatusOr<StoredState> StartUp(const Storage& storage, const std::string& replica,
                                    base::UnixMicros now);

// Sorted names of the entries.
std::vector<std::string> NamesIn(const std::filesystem::path& directory);
std::string ReadFile(const std::filesystem::path& file);
void WriteFile(const std::filesystem::path& file, const std::string& bytes);

}  // namespace certiq::server::testing

#endif  // CERTIQ_TESTS_STORE_STORE_EXAMPLES_H_
