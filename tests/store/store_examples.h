// Directories, records and tensors for the tests of the store.

#ifndef CERTIQ_TESTS_JOBS_STORE_EXAMPLES_H_
#define CERTIQ_TESTS_JOBS_STORE_EXAMPLES_H_

#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <span>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "store/store.h"

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

// Every field differs from its default, and from the other fields.
CalibrationRecord FullCalibration(const std::string& id);
JobRecord FullJob(const std::string& id, int64_t number);

// Bytes that follow from `seed`; no two MiB alike.
std::vector<std::byte> Pattern(const std::string& seed, int64_t bytes);

// In pieces of odd sizes.
absl::StatusOr<BlobRef> WriteBlob(Store& store, std::span<const std::byte> bytes);
absl::StatusOr<std::vector<std::byte>> ReadBlob(Store& store, const BlobRef& blob);

// Sorted names of the entries.
std::vector<std::string> NamesIn(const std::filesystem::path& directory);
std::string ReadFile(const std::filesystem::path& file);
void WriteFile(const std::filesystem::path& file, const std::string& bytes);

}  // namespace certiq::server::testing

#endif  // CERTIQ_TESTS_JOBS_STORE_EXAMPLES_H_
