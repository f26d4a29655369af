// Every event in every state of a record.

#include "store/transitions.h"

#include <gtest/gtest.h>

#include <string>
#include <vector>

#include "base/status.h"
#include "store/store_examples.h"
#include "support/text.h"

namespace certiq::server::testing {
namespace {

constexpr base::UnixMicros kEventTime = 1000;
constexpr char kOurs[] = "claim of ours";

enum class Claimed { kByNobody, kByUs, kByAnother };

// A job as it can be stored.
struct Situation {
  std::string name;
  JobRecord job;
  Claimed claimed = Claimed::kByNobody;

  bool final() const { return IsFinal(job.state()); }
  bool running() const { return job.state() == v1::JOB_STATE_RUNNING; }
  bool ours() const { return claimed == Claimed::kByUs; }
};

std::vector<Situation> Situations() {
  std::vector<Situation> all;
  const auto add = [&](const std::string& name, JobState state, Claimed claimed, int cancel_code) {
    Situation situation{name, QueuedJob("j"), claimed};
    JobRecord& job = situation.job;
    job.set_state(state);
    if (claimed != Claimed::kByNobody) {
      job.set_claim(claimed == Claimed::kByUs ? kOurs : "claim of another");
      if (!IsFinal(state)) job.set_owner(claimed == Claimed::kByUs ? "us" : "another");
    }
    if (state != v1::JOB_STATE_QUEUED) {
      job.set_start_time(500);
      job.set_starts(1);
    }
    job.set_cancel_code(cancel_code);
    if (IsFinal(state)) {
      job.clear_weights();
      job.set_end_time(600);
    }
    all.push_back(situation);
  };
  add("queued", v1::JOB_STATE_QUEUED, Claimed::kByNobody, 0);
  for (const auto& [who, claimed] :
       {std::pair{"ours", Claimed::kByUs}, std::pair{"another's", Claimed::kByAnother}}) {
    for (const int code : {0, static_cast<int>(absl::StatusCode::kCancelled),
                           static_cast<int>(absl::StatusCode::kDeadlineExceeded)}) {
      const std::string name = std::string(who) + ", asked to end with " + std::to_string(code);
      add("claimed, " + name, v1::JOB_STATE_QUEUED, claimed, code);
      add("running, " + name, v1::JOB_STATE_RUNNING, claimed, code);
    }
  }
  for (const JobState state : {v1::JOB_STATE_SUCCEEDED, v1::JOB_STATE_FAILED,
                               v1::JOB_STATE_CANCELLED, v1::JOB_STATE_EXPIRED}) {
    for (const Claimed claimed : {Claimed::kByNobody, Claimed::kByUs, Claimed::kByAnother}) {
      add("ended in state " + std::to_string(state) + ", claimed " +
              std::to_string(static_cast<int>(claimed)),
          state, claimed, 0);
    }
  }
  return all;
}

// Expects ABORTED, or the record that `expected` makes of the job.
template <typename Change>
void ExpectJob(const absl::StatusOr<JobRecord>& got, const Situation& before, bool allowed,
               Change expected) {
  SCOPED_TRACE(before.name);
  if (!allowed) {
    EXPECT_TRUE(absl::IsAborted(got.status())) << got.status();
    EXPECT_CONTAINS(got.status().message(), before.job.id());
    return;
  }
  ASSERT_TRUE(got.ok()) << got.status();
  JobRecord after = before.job;
  expected(after);
  EXPECT_TRUE(Same(*got, after));
}

void Stays(JobRecord& /*job*/) {}

// The fields that ending a job sets and clears, but for those of its outcome.
void End(JobRecord& job, JobState state, base::UnixMicros now) {
  job.set_state(state);
  job.set_end_time(now);
  job.clear_weights();
  job.clear_owner();
  job.clear_cancel_code();
}

JobRecord WithoutError(JobRecord job) {
  job.clear_error();
  return job;
}

TEST(TransitionsTest, EachStatusStandsForOneState) {
  for (int code = 0; code <= 16; ++code) {
    const auto status = static_cast<absl::StatusCode>(code);
    const JobState state = StateOf(status);
    EXPECT_TRUE(IsFinal(state));
    EXPECT_EQ(state == v1::JOB_STATE_SUCCEEDED, status == absl::StatusCode::kOk);
    EXPECT_EQ(state == v1::JOB_STATE_CANCELLED, status == absl::StatusCode::kCancelled);
    EXPECT_EQ(state == v1::JOB_STATE_EXPIRED, status == absl::StatusCode::kDeadlineExceeded);
  }
}

TEST(TransitionsTest, Claim) {
  for (const Situation& before : Situations()) {
    const bool free = !before.final() && before.claimed == Claimed::kByNobody;
    // Ours already: a repetition.
    ExpectJob(Claim(before.job, "us", kOurs), before, free || (before.ours() && !before.final()),
              [](JobRecord& job) {
                job.set_owner("us");
                job.set_claim(kOurs);
              });
  }
}

TEST(TransitionsTest, Start) {
  for (const Situation& before : Situations()) {
    ExpectJob(Start(before.job, kOurs, kEventTime), before, before.ours() && !before.final(),
              [](JobRecord& job) {
                // What runs was started by this claim: a repetition counts nothing.
                if (job.state() == v1::JOB_STATE_RUNNING) return;
                job.set_state(v1::JOB_STATE_RUNNING);
                job.set_start_time(kEventTime);
                job.set_starts(1);
              });
  }
}

TEST(TransitionsTest, Release) {
  for (const Situation& before : Situations()) {
    if (!before.ours()) {
      // Given back before, and perhaps claimed by another since.
      ExpectJob(Release(before.job, kOurs), before, true, Stays);
      continue;
    }
    ExpectJob(Release(before.job, kOurs), before, !before.final(), [](JobRecord& job) {
      job.set_state(v1::JOB_STATE_QUEUED);
      job.set_starts(0);
      job.clear_owner();
      job.clear_claim();
    });
  }
}

TEST(TransitionsTest, Finish) {
  ResultRecord result;
  *result.mutable_blob() = MakeBlobRef("result", 3);
  for (const Situation& before : Situations()) {
    SCOPED_TRACE(before.name);
    for (const absl::Status& status :
         {absl::OkStatus(), absl::CancelledError("as asked"), absl::DeadlineExceededError("late"),
          base::InvalidField("spec.bits", "of a kind")}) {
      JobOutcome outcome{.status = status, .result = std::nullopt, .end_time = kEventTime};
      if (status.ok()) outcome.result = result;
      const auto got = Finish(before.job, kOurs, outcome);
      if (before.final() && before.ours()) {
        // Done before: the first outcome stays.
        ExpectJob(got, before, true, Stays);
        continue;
      }
      if (got.ok()) {
        EXPECT_EQ(got->has_error(), !status.ok());
        EXPECT_EQ(got->error().code(), static_cast<int>(status.code()));
        EXPECT_EQ(got->error().message(), status.message());
        // Details too, so that a client is told the field.
        EXPECT_EQ(got->error().details_size(), base::FieldOf(status).has_value() ? 1 : 0);
      }
      ExpectJob(got.ok() ? WithoutError(*got) : got, before, before.ours() && !before.final(),
                [&](JobRecord& job) {
                  End(job, StateOf(status.code()), kEventTime);
                  if (status.ok()) *job.mutable_result() = result;
                });
    }
  }
}

TEST(TransitionsTest, Cancel) {
  for (const Situation& before : Situations()) {
    for (const absl::Status& reason :
         {absl::CancelledError("as asked"), absl::DeadlineExceededError("late")}) {
      const JobRecord got = Cancel(before.job, reason, kEventTime);
      ExpectJob(WithoutError(got), before, true, [&](JobRecord& job) {
        if (before.final()) return;
        if (before.claimed == Claimed::kByNobody)
          return End(job, StateOf(reason.code()), kEventTime);
        // The first reason stays.
        if (job.cancel_code() == 0) job.set_cancel_code(static_cast<int>(reason.code()));
      });
      const bool ended = !before.final() && before.claimed == Claimed::kByNobody;
      EXPECT_EQ(got.error().message(), ended ? reason.message() : "");
    }
  }
}

TEST(TransitionsTest, Fence) {
  for (const Situation& before : Situations()) {
    for (int starts = 0; starts <= kMaxStarts; ++starts) {
      Situation with = before;
      with.job.set_starts(starts);
      SCOPED_TRACE(starts);
      const JobRecord got = Fence(with.job, kEventTime);
      const bool asked = with.job.cancel_code() != 0;
      const bool given_up = !asked && starts == kMaxStarts;
      EXPECT_EQ(got.has_error(), !with.final() && (asked || given_up)) << with.name;
      ExpectJob(WithoutError(got), with, true, [&](JobRecord& job) {
        if (with.final()) return;
        if (asked) {
          return End(job, StateOf(static_cast<absl::StatusCode>(job.cancel_code())), kEventTime);
        }
        if (given_up) return End(job, v1::JOB_STATE_FAILED, kEventTime);
        // It keeps its weights, its starts, and the time of its last one.
        job.set_state(v1::JOB_STATE_QUEUED);
        job.clear_owner();
        job.clear_claim();
      });
      if (!with.final() && given_up) {
        EXPECT_EQ(got.error().code(), static_cast<int>(absl::StatusCode::kInternal));
        EXPECT_CONTAINS(got.error().message(), "4 times");
      }
    }
  }
}

TEST(TransitionsTest, AnEmptyClaimIsNobodys) {
  JobRecord job = QueuedJob("j");
  EXPECT_TRUE(absl::IsAborted(Start(job, "", kEventTime).status()));
  EXPECT_TRUE(absl::IsAborted(Finish(job, "", {}).status()));
  EXPECT_TRUE(absl::IsAborted(Release(job, "").status()));
  job.set_state(v1::JOB_STATE_CANCELLED);
  EXPECT_TRUE(absl::IsAborted(Finish(job, "", {}).status()));
}

TEST(TransitionsTest, OnlyEndedJobsAreRemovable) {
  for (const Situation& before : Situations()) {
    const absl::Status status = CheckRemovable(before.job);
    EXPECT_EQ(status.ok(), before.final()) << before.name;
    if (status.ok()) continue;
    EXPECT_TRUE(absl::IsFailedPrecondition(status)) << status;
    EXPECT_EQ(base::PreconditionOf(status)->type, "NOT_ENDED");
    EXPECT_EQ(base::PreconditionOf(status)->subject, "j");
  }
}

SumsCommit SomeSums(bool finalize) {
  SumsCommit commit;
  commit.sums = MakeBlobRef("new sums", 5);
  commit.tokens = 7;
  commit.held_out_tokens = 2;
  commit.streams = {MakeStream("a", 3, 9, false)};
  commit.update_time = kEventTime;
  commit.finalize = finalize;
  commit.sums_sha256 = "sha256";
  return commit;
}

TEST(TransitionsTest, CommitIntoAnOpenCalibration) {
  for (const bool finalize : {false, true}) {
    // What it had before is replaced.
    CalibrationRecord before = OpenCalibration("c");
    *before.mutable_sums() = MakeBlobRef("old sums", 4);
    *before.add_streams() = MakeStream("b", 1, 1, true);
    const SumsCommit commit = SomeSums(finalize);
    const auto got = Commit(before, commit);
    ASSERT_TRUE(got.ok()) << got.status();
    CalibrationRecord after = OpenCalibration("c");
    *after.mutable_sums() = commit.sums;
    after.set_tokens(7);
    after.set_held_out_tokens(2);
    *after.add_streams() = commit.streams[0];
    after.set_update_time(kEventTime);
    if (finalize) {
      after.set_finalize_time(kEventTime);
      after.set_sums_sha256("sha256");
    }
    EXPECT_TRUE(Same(*got, after));
    EXPECT_EQ(CheckFinalized(*got).ok(), finalize);
    // A repetition changes nothing.
    const auto again = Commit(*got, commit);
    ASSERT_TRUE(again.ok()) << again.status();
    EXPECT_TRUE(Same(*again, after));
  }
}

TEST(TransitionsTest, AFinalizedCalibrationTakesNoOtherCommit) {
  const auto finalized = Commit(OpenCalibration("c"), SomeSums(true));
  ASSERT_TRUE(finalized.ok());
  SumsCommit other = SomeSums(true);
  other.sums.set_name("other sums");
  for (const SumsCommit& commit : {SomeSums(false), other}) {
    const absl::Status status = Commit(*finalized, commit).status();
    EXPECT_TRUE(absl::IsFailedPrecondition(status)) << status;
    EXPECT_EQ(base::PreconditionOf(status)->type, "FINALIZED");
  }
}

TEST(TransitionsTest, WhatUsesACalibration) {
  const CalibrationRecord open = OpenCalibration("c");
  const absl::Status not_finalized = CheckFinalized(open);
  EXPECT_TRUE(absl::IsFailedPrecondition(not_finalized)) << not_finalized;
  EXPECT_EQ(base::PreconditionOf(not_finalized)->type, "NOT_FINALIZED");
  EXPECT_TRUE(CheckFinalized(FullCalibration("c")).ok());

  EXPECT_TRUE(CheckRemovable(open, 0).ok());
  const absl::Status in_use = CheckRemovable(open, 2);
  EXPECT_TRUE(absl::IsFailedPrecondition(in_use)) << in_use;
  EXPECT_EQ(base::PreconditionOf(in_use)->type, "IN_USE");
  EXPECT_CONTAINS(in_use.message(), "2 jobs");
}

}  // namespace
}  // namespace certiq::server::testing
