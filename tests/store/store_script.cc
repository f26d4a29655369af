#include "store/store_script.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <iterator>
#include <optional>
#include <set>
#include <utility>

namespace certiq::server::testing {
namespace {

constexpr char kReplica[] = "replica";
constexpr base::UnixMicros kRestart = 2'000'000;

// The seed of every tensor, so that a record that names it says what is in it.
// The digest is stored with the last sums only.
std::string SeedOfSums(const CalibrationRecord& record) {
  return record.sums_sha256().empty() ? "sums 1" : record.sums_sha256();
}
std::string SeedOfWeights(const JobRecord& record) { return record.weights_sha256(); }
std::string SeedOfResult(const JobRecord& record) { return "result of " + record.id(); }

// Pattern, made once: the script is run for every operation in it.
const std::vector<std::byte>& Tensor(const std::string& seed, int64_t bytes) {
  static std::map<std::pair<std::string, int64_t>, std::vector<std::byte>> made;
  std::vector<std::byte>& tensor = made[{seed, bytes}];
  if (tensor.empty() && bytes > 0) tensor = Pattern(seed, bytes);
  return tensor;
}

absl::Status Write(Scene& scene, const std::string& seed, int64_t bytes) {
  const absl::StatusOr<BlobRef> blob = WriteBlob(*scene.storage->blobs, Tensor(seed, bytes));
  if (blob.ok()) scene.blobs[seed] = *blob;
  return blob.status();
}

absl::Status Forget(Scene& scene, const std::string& seed) {
  scene.storage->Forget(scene.blobs[seed]);
  return absl::OkStatus();
}

absl::Status Check(Scene& scene, const std::string& seed) {
  const BlobRef& blob = scene.blobs[seed];
  const absl::StatusOr<std::vector<std::byte>> bytes = ReadBlob(*scene.storage->blobs, blob);
  if (!bytes.ok()) return bytes.status();
  EXPECT_TRUE(*bytes == Tensor(seed, blob.bytes())) << seed;
  return absl::OkStatus();
}

absl::Status Keep(Scene& scene, const absl::StatusOr<CalibrationRecord>& calibration) {
  if (calibration.ok()) scene.model.calibrations[calibration->id()] = *calibration;
  return calibration.status();
}
absl::Status Keep(Scene& scene, const absl::StatusOr<JobChange>& change) {
  if (change.ok()) scene.model.jobs[change->job.id()] = change->job;
  return change.status();
}

absl::Status AddCalibration(Scene& scene, const std::string& id) {
  return Keep(scene, scene.catalog->AddCalibration(OpenCalibration(id)));
}

absl::Status CommitSums(Scene& scene, const std::string& id, const std::string& seed,
                        int64_t streams, bool finalize) {
  SumsCommit commit;
  commit.sums = scene.blobs[seed];
  commit.tokens = streams;
  commit.update_time = streams;
  commit.finalize = finalize;
  commit.sums_sha256 = seed;
  for (int64_t i = 0; i < streams; ++i) {
    commit.streams.push_back(MakeStream(std::to_string(i), streams, i, false));
  }
  return Keep(scene, scene.catalog->CommitSums(id, commit));
}

absl::Status AddJob(Scene& scene, const std::string& id, const std::string& weights) {
  JobRecord job = QueuedJob(id);
  job.set_calibration_id("c1");
  job.set_weights_sha256(weights);
  *job.mutable_weights() = scene.blobs[weights];
  return Keep(scene, scene.catalog->AddJob(job));
}

// Expects to get `id`.
absl::Status ClaimStep(Scene& scene, const std::string& id, const std::string& claim) {
  const absl::StatusOr<std::optional<JobRecord>> job = scene.catalog->ClaimJob(kReplica, claim, {});
  if (!job.ok()) return job.status();
  if (!job->has_value() || (*job)->id() != id) return absl::InternalError("claimed another");
  scene.model.jobs[id] = **job;
  return absl::OkStatus();
}

absl::Status StartStep(Scene& scene, const std::string& id, const std::string& claim) {
  return Keep(scene, scene.catalog->StartJob(id, claim, 1000));
}

absl::Status FinishStep(Scene& scene, const std::string& id, const std::string& claim,
                        absl::Status status, const std::string& result) {
  JobOutcome outcome;
  outcome.status = std::move(status);
  outcome.end_time = 1001;
  if (!result.empty()) {
    outcome.result.emplace();
    *outcome.result->mutable_blob() = scene.blobs[result];
    outcome.result->set_tensor_bytes(1);
  }
  return Keep(scene, scene.catalog->FinishJob(id, claim, outcome));
}

absl::Status CancelStep(Scene& scene, const std::string& id) {
  return Keep(scene, scene.catalog->CancelJob(QueuedJob(id).tenant(), id,
                                              absl::CancelledError("as asked"), 1002));
}

// A removal whose answer was lost finds nothing when it is repeated.
absl::Status Done(const absl::Status& status) {
  return absl::IsNotFound(status) ? absl::OkStatus() : status;
}

absl::Status RemoveJob(Scene& scene, const std::string& id) {
  absl::Status status = Done(scene.catalog->RemoveJob(QueuedJob(id).tenant(), id).status());
  if (status.ok()) scene.model.jobs.erase(id);
  return status;
}

absl::Status RemoveCalibration(Scene& scene, const std::string& id) {
  absl::Status status =
      Done(scene.catalog->RemoveCalibration(OpenCalibration(id).tenant(), id).status());
  if (status.ok()) scene.model.calibrations.erase(id);
  return status;
}

constexpr int64_t kMebi = int64_t{1} << 20;

const Step kScript[] = {
    [](Scene& scene) { return AddCalibration(scene, "c1"); },
    [](Scene& scene) { return Write(scene, "sums 1", 70'000); },
    [](Scene& scene) { return CommitSums(scene, "c1", "sums 1", 3, false); },
    [](Scene& scene) { return Write(scene, "sums 2", kMebi + 1); },
    [](Scene& scene) { return CommitSums(scene, "c1", "sums 2", 100, true); },
    [](Scene& scene) { return Forget(scene, "sums 1"); },
    [](Scene& scene) { return Write(scene, "weights", 1); },
    [](Scene& scene) { return AddJob(scene, "j1", "weights"); },
    [](Scene& scene) { return ClaimStep(scene, "j1", "claim 1"); },
    [](Scene& scene) { return StartStep(scene, "j1", "claim 1"); },
    [](Scene& scene) { return Keep(scene, scene.catalog->ReleaseJob("j1", "claim 1")); },
    [](Scene& scene) { return ClaimStep(scene, "j1", "claim 2"); },
    [](Scene& scene) { return StartStep(scene, "j1", "claim 2"); },
    [](Scene& scene) { return Check(scene, "sums 2"); },
    [](Scene& scene) { return Write(scene, "result of j1", 5'000); },
    [](Scene& scene) {
      return FinishStep(scene, "j1", "claim 2", absl::OkStatus(), "result of j1");
    },
    [](Scene& scene) { return Forget(scene, "weights"); },
    [](Scene& scene) { return Write(scene, "weights 2", 2); },
    [](Scene& scene) { return AddJob(scene, "j2", "weights 2"); },
    [](Scene& scene) { return Write(scene, "weights 3", 3); },
    [](Scene& scene) { return AddJob(scene, "j3", "weights 3"); },
    // Nobody has claimed it, so that it ends at once.
    [](Scene& scene) { return CancelStep(scene, "j2"); },
    [](Scene& scene) { return Forget(scene, "weights 2"); },
    [](Scene& scene) { return RemoveJob(scene, "j2"); },
    [](Scene& scene) { return ClaimStep(scene, "j3", "claim 3"); },
    [](Scene& scene) { return StartStep(scene, "j3", "claim 3"); },
    // Its owner ends it.
    [](Scene& scene) { return CancelStep(scene, "j3"); },
    [](Scene& scene) {
      return FinishStep(scene, "j3", "claim 3", absl::CancelledError("it was"), "");
    },
    [](Scene& scene) { return Forget(scene, "weights 3"); },
    [](Scene& scene) { return Check(scene, "result of j1"); },
    [](Scene& scene) { return AddCalibration(scene, "c2"); },
    [](Scene& scene) { return RemoveCalibration(scene, "c1"); },
    [](Scene& scene) { return Forget(scene, "sums 2"); },
};

void HideName(BlobRef& blob) {
  if (!blob.name().empty()) blob.set_name("name");
}

CalibrationRecord WithoutNames(CalibrationRecord record) {
  if (record.has_sums()) HideName(*record.mutable_sums());
  return record;
}

JobRecord WithoutNames(JobRecord record) {
  if (record.has_weights()) HideName(*record.mutable_weights());
  if (record.has_result()) HideName(*record.mutable_result()->mutable_blob());
  return record;
}

// What a start makes of a job.
JobRecord AfterStart(const JobRecord& job) {
  return job.owner().empty() ? job : Fence(job, kRestart);
}

// Adds the name to `named`.
void ExpectTensor(Blobs& blobs, const BlobRef& blob, const std::string& seed,
                  std::set<std::string>& named, const std::string& when) {
  if (blob.name().empty()) return;
  named.insert(blob.name());
  const absl::StatusOr<std::vector<std::byte>> bytes = ReadBlob(blobs, blob);
  EXPECT_TRUE(bytes.ok()) << when << ": " << bytes.status();
  EXPECT_TRUE(bytes.ok() && *bytes == Tensor(seed, blob.bytes())) << when << ": " << seed;
}

}  // namespace

const std::vector<Step>& Script() {
  static const std::vector<Step> script(std::begin(kScript), std::end(kScript));
  return script;
}

bool IsModel(const StoredState& state, const Model& model) {
  if (state.calibrations.size() != model.calibrations.size()) return false;
  if (state.jobs.size() != model.jobs.size()) return false;
  const auto same_calibration = [&](const CalibrationRecord& record) {
    const auto expected = model.calibrations.find(record.id());
    return expected != model.calibrations.end() &&
           Same(WithoutNames(record), WithoutNames(expected->second));
  };
  const auto same_job = [&](const JobRecord& record) {
    const auto expected = model.jobs.find(record.id());
    return expected != model.jobs.end() &&
           Same(WithoutNames(record), WithoutNames(AfterStart(expected->second)));
  };
  return std::all_of(state.calibrations.begin(), state.calibrations.end(), same_calibration) &&
         std::all_of(state.jobs.begin(), state.jobs.end(), same_job);
}

void ExpectStored(const std::string& data_dir, const std::vector<Model>& models,
                  const std::string& when) {
  const absl::StatusOr<Storage> storage = OpenStorage(data_dir);
  ASSERT_TRUE(storage.ok()) << when << ": " << storage.status();
  const absl::StatusOr<StoredState> state = StartUp(*storage, kReplica, kRestart);
  ASSERT_TRUE(state.ok()) << when << ": " << state.status();
  EXPECT_TRUE(std::any_of(models.begin(), models.end(), [&](const Model& model) {
    return IsModel(*state, model);
  })) << when;
  std::set<std::string> named;
  for (const CalibrationRecord& record : state->calibrations) {
    ExpectTensor(*storage->blobs, record.sums(), SeedOfSums(record), named, when);
  }
  for (const JobRecord& record : state->jobs) {
    ExpectTensor(*storage->blobs, record.weights(), SeedOfWeights(record), named, when);
    ExpectTensor(*storage->blobs, record.result().blob(), SeedOfResult(record), named, when);
  }
  EXPECT_EQ(NamesIn(data_dir + "/tensors"), std::vector<std::string>(named.begin(), named.end()))
      << when;
  EXPECT_TRUE(NamesIn(data_dir + "/incoming").empty()) << when;
}

}  // namespace certiq::server::testing
