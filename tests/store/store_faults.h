// Disks that fail, or end the process, at an operation of the test's choosing.

#ifndef CERTIQ_TESTS_STORE_STORE_FAULTS_H_
#define CERTIQ_TESTS_STORE_STORE_FAULTS_H_

#include <gtest/gtest.h>

#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "absl/strings/string_view.h"
#include "store/disk.h"

namespace certiq::server::testing {

enum class Failure {
  kNone,
  // ENOSPC, SQLITE_FULL.
  kFull,
  // EIO, SQLITE_IOERR.
  kBroken,
  // As kFull, but half of it is done; of writes alone, which alone are counted.
  kHalfWritten,
  // The process ends before the operation.
  kCrash,
  // It ends in the middle of one; of writes alone as well.
  kCrashHalfWritten,
};

// For the names of tests that are run for several.
std::string FailureName(const ::testing::TestParamInfo<Failure>& info);

// Exit status of a process that crashed as planned.
inline constexpr int kCrashed = 77;

// Which operation fails, counted over the files of Disk and of SQLite together.
struct FaultPlan {
  Failure failure = Failure::kNone;
  // Operations until then.
  int64_t left = 0;
  // Every later operation of SQLite fails as well.
  bool lasting = false;
  bool struck = false;
  // Of a system call of Disk that was cut short, the rest is to fail.
  bool half_done = false;
  // Names of all operations so far.
  std::vector<std::string> trace;

  bool WantsHalf() const {
    return failure == Failure::kHalfWritten || failure == Failure::kCrashHalfWritten;
  }
  // Whether this operation is the one; kCrash does not return then.
  bool Strikes(const std::string& operation, bool is_write);
};

class FaultyDisk final : public Disk {
 public:
  FaultyDisk(std::string root, FaultPlan& plan) : Disk(std::move(root)), plan_(plan) {}

 protected:
  int Interfere(absl::string_view call, size_t& bytes) override;

 private:
  FaultPlan& plan_;
};

// Registers a way to files for SQLite that passes on to the default, and gives its name. `plan`
// is for the files of all tests from now on; syncs are counted but not done, as no machine fails.
const char* FaultyVfs(FaultPlan& plan);

}  // namespace certiq::server::testing

#endif  // CERTIQ_TESTS_STORE_STORE_FAULTS_H_
