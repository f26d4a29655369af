// A process that ends at every operation of a store's life in turn, and what the next one finds.

#include <gtest/gtest.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <memory>

#include "store/storage.h"
#include "store/store_examples.h"
#include "store/store_faults.h"
#include "store/store_script.h"

namespace certiq::server::testing {
namespace {

// What must be there after each number of steps.
std::vector<Model> ModelsAfterSteps() {
  const absl::StatusOr<Storage> storage = OpenStorage("");
  EXPECT_TRUE(storage.ok() && StartUp(*storage, "replica", 1).ok());
  Scene scene;
  scene.catalog = storage->catalog.get();
  scene.storage = &*storage;
  std::vector<Model> models = {scene.model};
  for (const Step step : Script()) {
    EXPECT_TRUE(step(scene).ok());
    models.push_back(scene.model);
  }
  return models;
}

// The script in a process of its own; a byte goes into `pipe` for each step that returned.
[[noreturn]] void LiveAndCrash(const std::string& data_dir, Failure failure, int64_t operation,
                               int pipe) {
  FaultPlan plan;
  plan.failure = failure;
  plan.left = operation;
  auto storage = OpenStorage(std::make_shared<FaultyDisk>(data_dir, plan), FaultyVfs(plan));
  if (!storage.ok() || !StartUp(*storage, "replica", 1).ok()) _exit(1);
  Scene scene;
  scene.catalog = storage->catalog.get();
  scene.storage = &*storage;
  for (const Step step : Script()) {
    if (!step(scene).ok()) _exit(2);
    if (write(pipe, "+", 1) != 1) _exit(3);
  }
  storage = absl::UnknownError("closed");
  _exit(0);
}

// How many steps returned before it crashed at `operation`; `finished` if it did not.
size_t StepsOfAProcess(const std::string& data_dir, Failure failure, int64_t operation,
                       bool& finished) {
  int ends[2] = {-1, -1};
  EXPECT_EQ(pipe(ends), 0);
  const pid_t child = fork();
  if (child == 0) LiveAndCrash(data_dir, failure, operation, ends[1]);
  close(ends[1]);
  size_t steps = 0;
  std::array<char, 64> buffer;
  ssize_t got = 0;
  while ((got = read(ends[0], buffer.data(), buffer.size())) > 0) {
    steps += static_cast<size_t>(got);
  }
  close(ends[0]);
  int status = -1;
  EXPECT_EQ(waitpid(child, &status, 0), child);
  EXPECT_TRUE(WIFEXITED(status)) << "operation " << operation << ": " << status;
  const int code = WEXITSTATUS(status);
  EXPECT_TRUE(code == 0 || code == kCrashed) << "operation " << operation << ": exit " << code;
  finished = code != kCrashed;
  return steps;
}

class StoreCrashTest : public ::testing::TestWithParam<Failure> {};

TEST_P(StoreCrashTest, AtEachOperationInTurn) {
  const std::vector<Model> models = ModelsAfterSteps();
  bool finished = false;
  int64_t operation = 0;
  for (; !finished && !HasFailure(); ++operation) {
    const TemporaryDirectory directory;
    const size_t steps = StepsOfAProcess(directory.data(), GetParam(), operation, finished);
    // Those that returned, and perhaps the one that was under way.
    const size_t next = std::min(steps + 1, models.size() - 1);
    ExpectStored(directory.data(), {models[steps], models[next]},
                 "crash at operation " + std::to_string(operation));
    // It can be used as before.
    ExpectStored(directory.data(), {models[steps], models[next]}, "started again");
  }
  EXPECT_GT(operation, 30);
  RecordProperty("operations", static_cast<int>(operation));
}

INSTANTIATE_TEST_SUITE_P(Each, StoreCrashTest,
                         ::testing::Values(Failure::kCrash, Failure::kCrashHalfWritten),
                         FailureName);

}  // namespace
}  // namespace certiq::server::testing
