// A catalog whose answers get lost: each call happens, the caller hears UNAVAILABLE and repeats it.

#include <gtest/gtest.h>

#include <memory>
#include <set>
#include <string>
#include <utility>
#include <vector>

#include "store/catalog.h"
#include "store/storage.h"
#include "store/store_examples.h"
#include "store/store_script.h"

namespace certiq::server::testing {
namespace {

class LosesAnswers final : public Catalog {
 public:
  explicit LosesAnswers(Catalog& catalog) : catalog_(catalog) {}

  // Answers that were lost so far.
  int lost() const { return lost_; }

  bool durable() const override { return catalog_.durable(); }
  bool settled() const override { return catalog_.settled(); }
  absl::Status Register(const std::string& replica, base::UnixMicros now,
                        absl::FunctionRef<void(const CalibrationRecord&)> calibration,
                        absl::FunctionRef<void(const JobRecord&)> job) override {
    return Lose(catalog_.Register(replica, now, calibration, job));
  }
  absl::StatusOr<CalibrationRecord> AddCalibration(const CalibrationRecord& record) override {
    return Lose(catalog_.AddCalibration(record));
  }
  absl::StatusOr<CalibrationRecord> FindCalibration(const std::string& tenant,
                                                    const std::string& id) override {
    return Lose(catalog_.FindCalibration(tenant, id));
  }
  absl::StatusOr<std::optional<CalibrationRecord>> FindCalibrationOfRequest(
      const std::string& tenant, const std::string& request_id) override {
    return Lose(catalog_.FindCalibrationOfRequest(tenant, request_id));
  }
  absl::StatusOr<std::vector<CalibrationRecord>> Calibrations(const CalibrationFilter& filter,
                                                              const std::optional<PageKey>& after,
                                                              int64_t count) override {
    return Lose(catalog_.Calibrations(filter, after, count));
  }
  absl::StatusOr<std::vector<CalibrationRecord>> ExpiredCalibrations(
      base::UnixMicros now) override {
    return Lose(catalog_.ExpiredCalibrations(now));
  }
  absl::StatusOr<CalibrationRecord> CommitSums(const std::string& id,
                                               const SumsCommit& commit) override {
    return Lose(catalog_.CommitSums(id, commit));
  }
  absl::StatusOr<CalibrationRecord> RemoveCalibration(const std::string& tenant,
                                                      const std::string& id) override {
    return Lose(catalog_.RemoveCalibration(tenant, id));
  }
  absl::StatusOr<int64_t> UnfinishedJobs(const std::string& calibration_id) override {
    return Lose(catalog_.UnfinishedJobs(calibration_id));
  }
  absl::StatusOr<JobChange> AddJob(const JobRecord& record) override {
    return Lose(catalog_.AddJob(record));
  }
  absl::StatusOr<JobRecord> FindJob(const std::string& tenant, const std::string& id) override {
    return Lose(catalog_.FindJob(tenant, id));
  }
  absl::StatusOr<std::optional<JobRecord>> FindJobOfRequest(
      const std::string& tenant, const std::string& request_id) override {
    return Lose(catalog_.FindJobOfRequest(tenant, request_id));
  }
  absl::StatusOr<std::vector<JobRecord>> Jobs(const JobFilter& filter,
                                              const std::optional<PageKey>& after,
                                              int64_t count) override {
    return Lose(catalog_.Jobs(filter, after, count));
  }
  absl::StatusOr<int64_t> Ahead(const JobRecord& job) override { return Lose(catalog_.Ahead(job)); }
  absl::StatusOr<std::vector<JobRecord>> OverdueJobs(base::UnixMicros now) override {
    return Lose(catalog_.OverdueJobs(now));
  }
  absl::StatusOr<std::vector<JobRecord>> ExpiredJobs(base::UnixMicros now) override {
    return Lose(catalog_.ExpiredJobs(now));
  }
  absl::StatusOr<std::optional<JobRecord>> ClaimJob(const std::string& replica,
                                                    const std::string& claim,
                                                    const std::set<std::string>& without) override {
    return Lose(catalog_.ClaimJob(replica, claim, without));
  }
  absl::StatusOr<JobChange> StartJob(const std::string& id, const std::string& claim,
                                     base::UnixMicros now) override {
    return Lose(catalog_.StartJob(id, claim, now));
  }
  absl::StatusOr<JobChange> ReleaseJob(const std::string& id, const std::string& claim) override {
    return Lose(catalog_.ReleaseJob(id, claim));
  }
  absl::StatusOr<JobChange> FinishJob(const std::string& id, const std::string& claim,
                                      const JobOutcome& outcome) override {
    return Lose(catalog_.FinishJob(id, claim, outcome));
  }
  absl::StatusOr<JobChange> CancelJob(const std::string& tenant, const std::string& id,
                                      const absl::Status& reason, base::UnixMicros now) override {
    return Lose(catalog_.CancelJob(tenant, id, reason, now));
  }
  absl::StatusOr<JobRecord> RemoveJob(const std::string& tenant, const std::string& id) override {
    return Lose(catalog_.RemoveJob(tenant, id));
  }

 private:
  // Every other answer is lost. That of a call that failed is not: it did nothing.
  template <typename Answer>
  Answer Lose(Answer answer) {
    if (!answer.ok()) return answer;
    lose_ = !lose_;
    if (!lose_) return answer;
    ++lost_;
    return absl::UnavailableError("the answer was lost");
  }

  Catalog& catalog_;
  bool lose_ = false;
  int lost_ = 0;
};

// A step whose answer was lost is repeated.
void RunScript(Scene& scene) {
  for (size_t i = 0; i < Script().size(); ++i) {
    absl::Status status = Script()[i](scene);
    if (absl::IsUnavailable(status)) status = Script()[i](scene);
    EXPECT_TRUE(status.ok()) << "step " << i << ": " << status;
    if (!status.ok()) return;
  }
}

TEST(LostAnswersTest, RepeatedCallsLeaveTheSame) {
  const TemporaryDirectory directory;
  Model expected;
  {
    const auto storage = OpenStorage("");
    ASSERT_TRUE(storage.ok() && StartUp(*storage, "replica", 1).ok());
    Scene scene;
    scene.catalog = storage->catalog.get();
    scene.storage = &*storage;
    RunScript(scene);
    expected = scene.model;
  }
  {
    const auto storage = OpenStorage(directory.data());
    ASSERT_TRUE(storage.ok()) << storage.status();
    LosesAnswers catalog(*storage->catalog);
    EXPECT_TRUE(absl::IsUnavailable(RegisterReplica(catalog, "replica", 1).status()));
    ASSERT_TRUE(RegisterReplica(catalog, "replica", 1).ok());
    Scene scene;
    scene.catalog = &catalog;
    scene.storage = &*storage;
    RunScript(scene);
    EXPECT_GE(catalog.lost(), 20);
    StoredState told;
    for (const auto& [id, record] : scene.model.calibrations) told.calibrations.push_back(record);
    for (const auto& [id, record] : scene.model.jobs) told.jobs.push_back(record);
    EXPECT_TRUE(IsModel(told, expected));
  }
  ExpectStored(directory.data(), {expected}, "at the end");
}

}  // namespace
}  // namespace certiq::server::testing
