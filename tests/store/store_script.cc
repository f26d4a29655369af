#include "store/store_script.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <memory>
#include <set>

#include "store/sqlite_store.h"
#include "store/store_examples.h"

namespace certiq::server::testing {
namespace {

// Of every tensor, so that a record that names it says what is in it.
std::string SeedOfSums(const CalibrationRecord& record) { return record.sums_sha256; }
std::string SeedOfWeights(const JobRecord& record) { return record.weights_sha256; }
std::string SeedOfResult(const JobRecord& record) { return record.result_header; }

absl::Status Write(Scene& scene, const std::string& seed, int64_t bytes) {
  const absl::StatusOr<BlobRef> blob = WriteBlob(*scene.store, Pattern(seed, bytes));
  if (blob.ok()) scene.blobs[seed] = *blob;
  return blob.status();
}

absl::Status PutCalibration(Scene& scene, const std::string& id, const std::string& seed,
                            int64_t streams) {
  CalibrationRecord record = FullCalibration(id);
  record.sums = seed.empty() ? BlobRef() : scene.blobs[seed];
  record.sums_sha256 = seed;
  for (int64_t i = 0; i < streams; ++i) {
    record.streams.push_back({std::to_string(i), streams, i, false});
  }
  absl::Status status = scene.store->PutCalibration(record);
  if (status.ok()) scene.model.calibrations[id] = record;
  return status;
}

absl::Status PutJob(Scene& scene, const std::string& id, JobState state, const std::string& weights,
                    const std::string& result) {
  JobRecord record = FullJob(id, id.back());
  record.state = state;
  record.weights = weights.empty() ? BlobRef() : scene.blobs[weights];
  record.weights_sha256 = weights;
  record.result = result.empty() ? BlobRef() : scene.blobs[result];
  record.result_header = result;
  absl::Status status = scene.store->PutJob(record);
  if (status.ok()) scene.model.jobs[id] = record;
  return status;
}

absl::Status DeleteBlob(Scene& scene, const std::string& seed) {
  scene.store->DeleteBlob(scene.blobs[seed]);
  return absl::OkStatus();
}

absl::Status Check(Scene& scene, const std::string& seed) {
  const BlobRef& blob = scene.blobs[seed];
  const absl::StatusOr<std::vector<std::byte>> bytes = ReadBlob(*scene.store, blob);
  if (!bytes.ok()) return bytes.status();
  EXPECT_TRUE(*bytes == Pattern(seed, blob.bytes)) << seed;
  return absl::OkStatus();
}

constexpr int64_t kMebi = int64_t{1} << 20;

const Step kScript[] = {
    [](Scene& scene) { return PutCalibration(scene, "c1", "", 0); },
    [](Scene& scene) { return Write(scene, "sums 1", 70'000); },
    [](Scene& scene) { return PutCalibration(scene, "c1", "sums 1", 3); },
    [](Scene& scene) { return Write(scene, "sums 2", kMebi + 1); },
    [](Scene& scene) { return PutCalibration(scene, "c1", "sums 2", 100); },
    [](Scene& scene) { return DeleteBlob(scene, "sums 1"); },
    [](Scene& scene) { return Write(scene, "weights", 1); },
    [](Scene& scene) { return PutJob(scene, "j1", JobState::kQueued, "weights", ""); },
    [](Scene& scene) { return PutJob(scene, "j1", JobState::kRunning, "weights", ""); },
    [](Scene& scene) { return Check(scene, "sums 2"); },
    [](Scene& scene) { return Write(scene, "result", 5'000); },
    [](Scene& scene) { return PutJob(scene, "j1", JobState::kSucceeded, "", "result"); },
    [](Scene& scene) { return DeleteBlob(scene, "weights"); },
    [](Scene& scene) { return PutJob(scene, "j2", JobState::kFailed, "", ""); },
    [](Scene& scene) {
      absl::Status status = scene.store->DeleteJob("j2");
      if (status.ok()) scene.model.jobs.erase("j2");
      return status;
    },
    [](Scene& scene) { return Check(scene, "result"); },
    [](Scene& scene) { return PutCalibration(scene, "c2", "", 1); },
    [](Scene& scene) {
      absl::Status status = scene.store->DeleteCalibration("c1");
      if (status.ok()) scene.model.calibrations.erase("c1");
      return status;
    },
    [](Scene& scene) { return DeleteBlob(scene, "sums 2"); },
};

void HideName(BlobRef& blob) {
  if (!blob.empty()) blob.name = "name";
}

// Adds the name to `named`.
void ExpectTensor(Store& store, const BlobRef& blob, const std::string& seed,
                  std::set<std::string>& named, const std::string& when) {
  if (blob.empty()) return;
  named.insert(blob.name);
  const absl::StatusOr<std::vector<std::byte>> bytes = ReadBlob(store, blob);
  EXPECT_TRUE(bytes.ok()) << when << ": " << bytes.status();
  EXPECT_TRUE(bytes.ok() && *bytes == Pattern(seed, blob.bytes)) << when << ": " << seed;
}

}  // namespace

const std::vector<Step>& Script() {
  static const std::vector<Step> script(std::begin(kScript), std::end(kScript));
  return script;
}

bool IsModel(const StoredState& state, const Model& model) {
  if (state.calibrations.size() != model.calibrations.size()) return false;
  if (state.jobs.size() != model.jobs.size()) return false;
  const auto same_calibration = [&](CalibrationRecord record) {
    const auto expected = model.calibrations.find(record.id);
    if (expected == model.calibrations.end()) return false;
    CalibrationRecord other = expected->second;
    HideName(record.sums);
    HideName(other.sums);
    return record == other;
  };
  const auto same_job = [&](JobRecord record) {
    const auto expected = model.jobs.find(record.id);
    if (expected == model.jobs.end()) return false;
    JobRecord other = expected->second;
    for (BlobRef* blob : {&record.weights, &record.result, &other.weights, &other.result}) {
      HideName(*blob);
    }
    return record == other;
  };
  return std::all_of(state.calibrations.begin(), state.calibrations.end(), same_calibration) &&
         std::all_of(state.jobs.begin(), state.jobs.end(), same_job);
}

void ExpectStored(const std::string& data_dir, const std::vector<Model>& models,
                  const std::string& when) {
  const auto opened = OpenSqliteStore(data_dir);
  ASSERT_TRUE(opened.ok()) << when << ": " << opened.status();
  Store& store = **opened;
  const absl::StatusOr<StoredState> state = store.Load();
  ASSERT_TRUE(state.ok()) << when << ": " << state.status();
  EXPECT_TRUE(std::any_of(models.begin(), models.end(), [&](const Model& model) {
    return IsModel(*state, model);
  })) << when;
  std::set<std::string> named;
  for (const CalibrationRecord& record : state->calibrations) {
    ExpectTensor(store, record.sums, SeedOfSums(record), named, when);
  }
  for (const JobRecord& record : state->jobs) {
    ExpectTensor(store, record.weights, SeedOfWeights(record), named, when);
    ExpectTensor(store, record.result, SeedOfResult(record), named, when);
  }
  EXPECT_EQ(NamesIn(data_dir + "/tensors"), std::vector<std::string>(named.begin(), named.end()))
      << when;
  EXPECT_TRUE(NamesIn(data_dir + "/incoming").empty()) << when;
}

}  // namespace certiq::server::testing
