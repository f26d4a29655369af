// Databases of schema 1: all they hold comes along, or they stay as they are.

#include "store/upgrade.h"

#include <gtest/gtest.h>
#include <sqlite3.h>
#include <sys/wait.h>
#include <unistd.h>

#include <bit>
#include <cmath>
#include <filesystem>
#include <limits>
#include <map>
#include <memory>
#include <string>
#include <utility>
#include <variant>
#include <vector>

#include "absl/strings/match.h"
#include "store/checksum.h"
#include "store/storage.h"
#include "store/store_examples.h"
#include "store/store_faults.h"
#include "support/text.h"

namespace certiq::server::testing {
namespace {

// What an earlier server left when it was killed.
const std::filesystem::path kOldData =
    std::filesystem::path(CERTIQ_TESTS_DATA) / "data_dir_schema_1" / "data";
constexpr base::UnixMicros kNow = 5'000'000;

// Tables of schema 1, as that version made them.
constexpr char kSchema1[] = R"sql(
CREATE TABLE calibrations (
  id TEXT PRIMARY KEY, tenant TEXT NOT NULL, request_id TEXT NOT NULL,
  request_digest TEXT NOT NULL, features INTEGER NOT NULL, mismatched INTEGER NOT NULL,
  held_out_fraction REAL, held_out_block_rows INTEGER NOT NULL, create_time INTEGER NOT NULL,
  update_time INTEGER NOT NULL, ttl_micros INTEGER NOT NULL, finalize_time INTEGER NOT NULL,
  tokens INTEGER NOT NULL, held_out_tokens INTEGER NOT NULL, sums_blob TEXT NOT NULL,
  sums_bytes INTEGER NOT NULL, sums_sha256 TEXT NOT NULL, checksum INTEGER NOT NULL
) STRICT, WITHOUT ROWID;
CREATE TABLE calibration_labels (
  calibration_id TEXT NOT NULL REFERENCES calibrations ON DELETE CASCADE,
  position INTEGER NOT NULL, label TEXT NOT NULL, PRIMARY KEY (calibration_id, position)
) STRICT, WITHOUT ROWID;
CREATE TABLE calibration_streams (
  calibration_id TEXT NOT NULL REFERENCES calibrations ON DELETE CASCADE,
  position INTEGER NOT NULL, id TEXT NOT NULL, sequence INTEGER NOT NULL,
  tokens INTEGER NOT NULL, imported INTEGER NOT NULL, PRIMARY KEY (calibration_id, position)
) STRICT, WITHOUT ROWID;
CREATE TABLE jobs (
  id TEXT PRIMARY KEY, tenant TEXT NOT NULL, request_id TEXT NOT NULL,
  request_digest TEXT NOT NULL, number INTEGER NOT NULL, layer_name TEXT NOT NULL,
  calibration_id TEXT NOT NULL, spec BLOB NOT NULL, rows INTEGER NOT NULL,
  features INTEGER NOT NULL, weight_dtype INTEGER NOT NULL, weights_sha256 TEXT NOT NULL,
  weights_blob TEXT NOT NULL, weights_bytes INTEGER NOT NULL, priority INTEGER NOT NULL,
  create_time INTEGER NOT NULL, start_time INTEGER NOT NULL, end_time INTEGER NOT NULL,
  deadline_time INTEGER NOT NULL, ttl_micros INTEGER NOT NULL, state INTEGER NOT NULL,
  starts INTEGER NOT NULL, error BLOB NOT NULL, result_blob TEXT NOT NULL,
  result_bytes INTEGER NOT NULL, result_tensor_bytes INTEGER NOT NULL,
  result_header BLOB NOT NULL, relative_error REAL, lambda_used REAL, checksum INTEGER NOT NULL
) STRICT, WITHOUT ROWID;
PRAGMA user_version = 1;
PRAGMA journal_mode = WAL;
)sql";

// A row of schema 1: its columns in turn, and the digest that guards them.
class OldRow {
 public:
  void Integer(int64_t value) {
    values_.emplace_back(value);
    Digest(value);
  }
  void Real(double value) {
    values_.emplace_back(value);
    Digest(std::isnan(value) ? int64_t{-1} : std::bit_cast<int64_t>(value + 0.0));
  }
  void Text(const std::string& value) {
    values_.emplace_back(value);
    Digest(static_cast<int64_t>(value.size()));
    digested_ += value;
  }
  void Bytes(const std::string& value) {
    Text(value);
    values_.back() = Blob{value};
  }
  void Digest(int64_t value) {
    for (int shift = 0; shift < 64; shift += 8) {
      digested_.push_back(static_cast<char>(static_cast<uint64_t>(value) >> shift));
    }
  }
  // The row of another table that belongs to this one.
  void Digest(const OldRow& other) { digested_ += other.digested_; }
  void AddSum() {
    values_.emplace_back(static_cast<int64_t>(Checksum(std::as_bytes(std::span(digested_)), 0)));
  }

  void Insert(sqlite3* database, const std::string& table) const {
    std::string sql = "INSERT INTO " + table + " VALUES (?";
    for (size_t i = 1; i < values_.size(); ++i) sql += ", ?";
    sqlite3_stmt* insert = nullptr;
    ASSERT_EQ(sqlite3_prepare_v2(database, (sql + ")").c_str(), -1, &insert, nullptr), SQLITE_OK)
        << sqlite3_errmsg(database);
    for (size_t i = 0; i < values_.size(); ++i) Bind(insert, static_cast<int>(i + 1), values_[i]);
    EXPECT_EQ(sqlite3_step(insert), SQLITE_DONE) << sqlite3_errmsg(database);
    sqlite3_finalize(insert);
  }

 private:
  struct Blob {
    std::string bytes;
  };
  using Value = std::variant<int64_t, double, std::string, Blob>;

  static void Bind(sqlite3_stmt* insert, int index, const Value& value) {
    if (const auto* integer = std::get_if<int64_t>(&value)) {
      sqlite3_bind_int64(insert, index, *integer);
    } else if (const auto* real = std::get_if<double>(&value)) {
      sqlite3_bind_double(insert, index, *real);
    } else if (const auto* text = std::get_if<std::string>(&value)) {
      sqlite3_bind_text(insert, index, text->data(), static_cast<int>(text->size()),
                        SQLITE_TRANSIENT);
    } else {
      // A null pointer would bind NULL.
      const std::string& bytes = std::get<Blob>(value).bytes;
      sqlite3_bind_blob(insert, index, bytes.empty() ? "" : bytes.data(),
                        static_cast<int>(bytes.size()), SQLITE_TRANSIENT);
    }
  }

  std::vector<Value> values_;
  std::string digested_;
};

void InsertOld(sqlite3* database, const CalibrationRecord& record) {
  OldRow row;
  row.Text(record.id());
  row.Text(record.tenant());
  row.Text(record.request_id());
  row.Text(record.request_digest());
  row.Integer(record.features());
  row.Integer(record.mismatched() ? 1 : 0);
  row.Real(record.held_out_fraction());
  row.Integer(record.held_out_block_rows());
  row.Integer(record.create_time());
  row.Integer(record.update_time());
  row.Integer(record.ttl_micros());
  row.Integer(record.finalize_time());
  row.Integer(record.tokens());
  row.Integer(record.held_out_tokens());
  row.Text(record.sums().name());
  row.Integer(record.sums().bytes());
  row.Text(record.sums_sha256());
  row.Digest(record.labels_size());
  for (const std::string& label : record.labels()) {
    OldRow digested;
    digested.Text(label);
    row.Digest(digested);
  }
  row.Digest(record.streams_size());
  for (const StreamRecord& stream : record.streams()) {
    OldRow digested;
    digested.Text(stream.id());
    digested.Integer(stream.sequence());
    digested.Integer(stream.tokens());
    digested.Integer(stream.imported() ? 1 : 0);
    row.Digest(digested);
  }
  row.AddSum();
  row.Insert(database, "calibrations");
  for (int i = 0; i < record.labels_size(); ++i) {
    OldRow label;
    label.Text(record.id());
    label.Integer(i);
    label.Text(record.labels(i));
    label.Insert(database, "calibration_labels");
  }
  for (int i = 0; i < record.streams_size(); ++i) {
    OldRow stream;
    stream.Text(record.id());
    stream.Integer(i);
    stream.Text(record.streams(i).id());
    stream.Integer(record.streams(i).sequence());
    stream.Integer(record.streams(i).tokens());
    stream.Integer(record.streams(i).imported() ? 1 : 0);
    stream.Insert(database, "calibration_streams");
  }
}

void InsertOld(sqlite3* database, const JobRecord& record) {
  OldRow row;
  row.Text(record.id());
  row.Text(record.tenant());
  row.Text(record.request_id());
  row.Text(record.request_digest());
  row.Integer(record.number());
  row.Text(record.layer_name());
  row.Text(record.calibration_id());
  row.Bytes(record.spec().SerializeAsString());
  row.Integer(record.rows());
  row.Integer(record.features());
  row.Integer(record.weight_dtype() - 1);
  row.Text(record.weights_sha256());
  row.Text(record.weights().name());
  row.Integer(record.weights().bytes());
  row.Integer(record.priority());
  row.Integer(record.create_time());
  row.Integer(record.start_time());
  row.Integer(record.end_time());
  row.Integer(record.deadline_time());
  row.Integer(record.ttl_micros());
  row.Integer(record.state() - 1);
  row.Integer(record.starts());
  row.Bytes(record.has_error() ? record.error().SerializeAsString() : "");
  row.Text(record.result().blob().name());
  row.Integer(record.result().blob().bytes());
  row.Integer(record.result().tensor_bytes());
  row.Bytes(record.result().header().SerializeAsString());
  row.Real(record.result().relative_error());
  row.Real(record.result().lambda_used());
  row.AddSum();
  row.Insert(database, "jobs");
}

class UpgradeTest : public ::testing::Test {
 protected:
  std::filesystem::path Data() const { return directory_.data(); }

  void UseOldData() {
    std::filesystem::remove_all(Data());
    std::filesystem::copy(kOldData, Data(), std::filesystem::copy_options::recursive);
  }

  // Runs SQL on the database while no server has it; the rows' first columns, a row after another.
  std::vector<std::string> Sql(const std::string& sql) {
    std::vector<std::string> rows;
    WithDatabase([&](sqlite3* database) {
      const auto add = [](void* to, int /*columns*/, char** values, char** /*names*/) {
        static_cast<std::vector<std::string>*>(to)->emplace_back(values[0] == nullptr ? "NULL"
                                                                                      : values[0]);
        return 0;
      };
      EXPECT_EQ(sqlite3_exec(database, sql.c_str(), add, &rows, nullptr), SQLITE_OK)
          << sql << ": " << sqlite3_errmsg(database);
    });
    return rows;
  }

  template <typename Use>
  void WithDatabase(Use use) {
    sqlite3* database = nullptr;
    ASSERT_EQ(sqlite3_open((Data() / "state.db").c_str(), &database), SQLITE_OK);
    use(database);
    sqlite3_close(database);
  }

  std::string Version() { return Sql("PRAGMA user_version").at(0); }
  std::vector<std::string> Schema() { return Sql("SELECT sql FROM sqlite_schema ORDER BY name"); }

  absl::StatusOr<StoredState> Start() {
    const auto storage = OpenStorage(Data());
    if (!storage.ok()) return storage.status();
    return StartUp(*storage, "replica", kNow);
  }

  // What a start makes of kOldData.
  StoredState Expected() {
    UseOldData();
    const auto state = Start();
    EXPECT_TRUE(state.ok()) << state.status();
    return state.value_or(StoredState());
  }

  TemporaryDirectory directory_;
};

TEST_F(UpgradeTest, EveryFieldComesAlong) {
  const CalibrationRecord full = FullCalibration("calibration");
  CalibrationRecord bare;
  bare.set_id("bare");
  JobRecord ended = FullJob("ended", 7);
  ended.clear_owner();
  ended.clear_claim();
  ended.clear_cancel_code();
  JobRecord queued = QueuedJob("queued");
  queued.set_number(3);
  JobRecord numbers = FullJob("numbers", std::numeric_limits<int64_t>::max());
  numbers.clear_owner();
  numbers.clear_claim();
  numbers.clear_cancel_code();
  numbers.clear_error();
  numbers.mutable_result()->set_relative_error(std::numeric_limits<double>::quiet_NaN());
  numbers.mutable_result()->set_lambda_used(-std::numeric_limits<double>::infinity());
  JobRecord running = QueuedJob("running");
  running.set_number(2);
  running.set_state(v1::JOB_STATE_RUNNING);
  running.set_starts(kMaxStarts - 1);
  running.set_start_time(9);
  JobRecord given_up = running;
  given_up.set_id("given up");
  given_up.set_request_id("");
  given_up.set_number(1);
  given_up.set_starts(kMaxStarts);

  std::filesystem::create_directory(Data());
  WithDatabase([&](sqlite3* database) {
    ASSERT_EQ(sqlite3_exec(database, kSchema1, nullptr, nullptr, nullptr), SQLITE_OK)
        << sqlite3_errmsg(database);
    for (const CalibrationRecord& record : {full, bare}) InsertOld(database, record);
    for (const JobRecord& record : {ended, queued, numbers, running, given_up}) {
      InsertOld(database, record);
    }
  });
  for (int start = 0; start < 2; ++start) {
    const auto state = Start();
    ASSERT_TRUE(state.ok()) << state.status();
    EXPECT_TRUE(Same(state->calibrations, std::vector{bare, full}));
    // Schema 1 had no claims: what ran is waiting again, or is given up.
    EXPECT_TRUE(Same(state->jobs, std::vector{Fence(given_up, kNow), Fence(running, kNow), queued,
                                              ended, numbers}));
    EXPECT_EQ(state->jobs[0].state(), v1::JOB_STATE_FAILED);
    EXPECT_EQ(state->jobs[1].state(), v1::JOB_STATE_QUEUED);
    EXPECT_EQ(Version(), "2");
  }
  // Lists and requests find them.
  const auto storage = OpenStorage(Data());
  ASSERT_TRUE(storage.ok()) << storage.status();
  Catalog& catalog = *storage->catalog;
  EXPECT_EQ(catalog.Calibrations({full.tenant(), "same"}, std::nullopt, 9)->size(), 1u);
  EXPECT_EQ(catalog.FindJobOfRequest(ended.tenant(), ended.request_id()).value()->id(), "ended");
  EXPECT_EQ(catalog.UnfinishedJobs("calibration").value_or(-1), 2);
  EXPECT_EQ(catalog.ClaimJob("replica", "claim", {}).value()->id(), "running");
}

TEST_F(UpgradeTest, ADirectoryOfAnEarlierServer) {
  UseOldData();
  ASSERT_EQ(Version(), "1");
  const std::vector<std::string> tensors = NamesIn(Data() / "tensors");
  const StoredState state = Expected();
  EXPECT_EQ(state.calibrations.size(), 5u);
  std::map<std::string, JobRecord> jobs;
  for (const JobRecord& job : state.jobs) {
    jobs[job.request_id() + (job.tenant().empty() ? "" : " of " + job.tenant())] = job;
  }
  const std::map<std::string, JobState> states = {{"job-dense of alice", v1::JOB_STATE_SUCCEEDED},
                                                  {"job-dense", v1::JOB_STATE_SUCCEEDED},
                                                  {"job-gptq", v1::JOB_STATE_SUCCEEDED},
                                                  {"job-held out", v1::JOB_STATE_SUCCEEDED},
                                                  {"job-qronos", v1::JOB_STATE_SUCCEEDED},
                                                  {"job-failed", v1::JOB_STATE_FAILED},
                                                  {"job-cancelled", v1::JOB_STATE_CANCELLED},
                                                  {"job-expired", v1::JOB_STATE_EXPIRED},
                                                  {"job-queued", v1::JOB_STATE_QUEUED},
                                                  {"job-running", v1::JOB_STATE_QUEUED}};
  EXPECT_EQ(jobs.size(), states.size());
  for (const auto& [name, wanted] : states) {
    EXPECT_EQ(jobs[name].state(), wanted) << name;
    EXPECT_EQ(jobs[name].has_error(), wanted == v1::JOB_STATE_FAILED ||
                                          wanted == v1::JOB_STATE_CANCELLED ||
                                          wanted == v1::JOB_STATE_EXPIRED)
        << name;
  }
  EXPECT_EQ(jobs["job-running"].starts(), 1);
  // Nothing that a record names was removed, and all of it can be read.
  EXPECT_EQ(NamesIn(Data() / "tensors"), tensors);
  const auto storage = OpenStorage(Data());
  ASSERT_TRUE(storage.ok()) << storage.status();
  size_t read = 0;
  const auto expect_blob = [&](const BlobRef& blob) {
    if (blob.name().empty()) return;
    ++read;
    EXPECT_TRUE(ReadBlob(*storage->blobs, blob).ok()) << blob.name();
  };
  for (const CalibrationRecord& record : state.calibrations) expect_blob(record.sums());
  for (const JobRecord& record : state.jobs) {
    expect_blob(record.weights());
    expect_blob(record.result().blob());
  }
  EXPECT_EQ(read, tensors.size());
}

TEST_F(UpgradeTest, NothingOfSchema1IsLeft) {
  const StoredState state = Expected();
  const std::vector<std::string> upgraded = Schema();
  EXPECT_EQ(Sql("PRAGMA integrity_check"), std::vector<std::string>{"ok"});
  EXPECT_EQ(Sql("PRAGMA foreign_key_check"), std::vector<std::string>{});
  const auto again = Start();
  ASSERT_TRUE(again.ok()) << again.status();
  EXPECT_TRUE(Same(again->calibrations, state.calibrations));
  EXPECT_TRUE(Same(again->jobs, state.jobs));
  // The same as in a directory that this version made.
  std::filesystem::remove_all(Data());
  ASSERT_TRUE(Start().ok());
  EXPECT_EQ(Schema(), upgraded);
}

TEST_F(UpgradeTest, ChangedRecordsStopItAndSchema1Stays) {
  const char* changes[] = {
      "UPDATE jobs SET rows = rows + 1",
      "UPDATE jobs SET weight_dtype = weight_dtype + 1",
      "UPDATE jobs SET relative_error = 17",
      "UPDATE jobs SET spec = x'ff' WHERE state = 0",
      "UPDATE jobs SET error = x'ff' WHERE state = 3",
      "UPDATE jobs SET result_header = x'ff' WHERE state = 2",
      "UPDATE jobs SET checksum = checksum + 1",
      "UPDATE calibrations SET mismatched = 1 - mismatched",
      "UPDATE calibrations SET checksum = checksum + 1",
      "UPDATE calibration_streams SET tokens = tokens + 1 WHERE position = 0",
      "DELETE FROM calibration_streams WHERE position = 0",
      "DELETE FROM calibration_labels WHERE position = 0",
      "UPDATE calibration_labels SET position = position + 10 WHERE position = 0",
  };
  for (const char* change : changes) {
    SCOPED_TRACE(change);
    UseOldData();
    Sql(change);
    const std::vector<std::string> schema = Schema();
    for (int start = 0; start < 2; ++start) {
      const absl::Status status = Start().status();
      EXPECT_TRUE(absl::IsDataLoss(status)) << status;
      EXPECT_CONTAINS(status.message(), "state.db");
      EXPECT_EQ(Version(), "1");
      EXPECT_EQ(Schema(), schema);
      EXPECT_EQ(Sql("SELECT count(*) FROM jobs"), std::vector<std::string>{"10"});
    }
    EXPECT_EQ(NamesIn(Data() / "tensors"), NamesIn(kOldData / "tensors"));
  }
}

TEST_F(UpgradeTest, AMissingTableStopsIt) {
  for (const char* table : {"jobs", "calibrations", "calibration_labels", "calibration_streams"}) {
    UseOldData();
    Sql(std::string("PRAGMA foreign_keys = OFF; DROP TABLE ") + table);
    const absl::Status status = Start().status();
    EXPECT_TRUE(absl::IsDataLoss(status)) << table << ": " << status;
    EXPECT_CONTAINS(status.message(), "state.db");
    EXPECT_EQ(Version(), "1");
  }
}

class UpgradeFaultsTest : public UpgradeTest, public ::testing::WithParamInterface<Failure> {
 protected:
  static bool Crashes(Failure failure) {
    return failure == Failure::kCrash || failure == Failure::kCrashHalfWritten;
  }

  // Starts with a failure at this operation. False: there are not so many.
  bool StartWith(Failure failure, int64_t operation) {
    FaultPlan plan;
    plan.failure = failure;
    plan.left = operation;
    const auto start = [&]() -> absl::Status {
      const auto storage = OpenStorage(std::make_shared<FaultyDisk>(Data(), plan), FaultyVfs(plan));
      if (!storage.ok()) return storage.status();
      return StartUp(*storage, "replica", kNow).status();
    };
    if (!Crashes(failure)) {
      const absl::Status status = start();
      // SQLite's check of all pages tells a failed read as a page that it could not get.
      const bool in_check = absl::IsDataLoss(status) && failure == Failure::kBroken &&
                            (absl::StrContains(status.message(), "unable to get the page") ||
                             absl::StrContains(status.message(), "failed to get page"));
      EXPECT_TRUE(status.ok() || absl::IsResourceExhausted(status) || absl::IsUnavailable(status) ||
                  in_check)
          << operation << ": " << status;
      return plan.struck;
    }
    const pid_t child = fork();
    if (child == 0) _exit(start().ok() ? 0 : 1);
    int status = -1;
    EXPECT_EQ(waitpid(child, &status, 0), child);
    EXPECT_TRUE(WIFEXITED(status) && (WEXITSTATUS(status) == 0 || WEXITSTATUS(status) == kCrashed))
        << operation << ": " << status;
    return WEXITSTATUS(status) == kCrashed;
  }
};

TEST_P(UpgradeFaultsTest, AtEachOperationInTurn) {
  const StoredState expected = Expected();
  int64_t operation = 0;
  for (bool struck = true; struck && !HasFailure(); ++operation) {
    UseOldData();
    struck = StartWith(GetParam(), operation);
    // Whole as one or as the other.
    const std::string version = Version();
    EXPECT_TRUE(version == "1" || version == "2") << operation << ": " << version;
    EXPECT_EQ(Sql("SELECT count(*) FROM jobs"), std::vector<std::string>{"10"}) << operation;
    const auto state = Start();
    ASSERT_TRUE(state.ok()) << operation << ": " << state.status();
    EXPECT_TRUE(Same(state->calibrations, expected.calibrations)) << operation;
    EXPECT_TRUE(Same(state->jobs, expected.jobs)) << operation;
    EXPECT_EQ(NamesIn(Data() / "tensors"), NamesIn(kOldData / "tensors")) << operation;
  }
  EXPECT_GT(operation, 10);
  RecordProperty("operations", static_cast<int>(operation));
}

INSTANTIATE_TEST_SUITE_P(Each, UpgradeFaultsTest,
                         ::testing::Values(Failure::kFull, Failure::kBroken, Failure::kHalfWritten,
                                           Failure::kCrash, Failure::kCrashHalfWritten),
                         FailureName);

}  // namespace
}  // namespace certiq::server::testing
