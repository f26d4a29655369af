// The sums of an open calibration in this process, and the calls that send rows into them.

#ifndef CERTIQ_CALIBRATION_PARTIAL_SUMS_H_
#define CERTIQ_CALIBRATION_PARTIAL_SUMS_H_

#include <chrono>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include "absl/base/thread_annotations.h"
#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "base/listener.h"
#include "base/mutex.h"
#include "calibration/environment.h"
#include "calibration/split_accumulator.h"
#include "engine/kernels/dtype.h"
#include "runtime/byte_budget.h"
#include "runtime/strand.h"
#include "store/records.h"

namespace certiq::server {

// The position of a stream; StreamProgress in the contract says what the numbers mean.
struct StreamView {
  std::string id;
  int64_t received = 0;
  int64_t durable = 0;
  int64_t tokens = 0;
  bool live = false;
  bool imported = false;
};

// What FinalizeCalibrationRequest expects of a calibration.
struct FinalizeExpectations {
  // Held-out ones included.
  std::optional<int64_t> tokens;
  // Streams that have sent something and have no open call.
  std::vector<std::string> stream_ids;
};
// FAILED_PRECONDITION where `tokens` in all and `streams` are not what is expected.
absl::Status CheckExpectations(const FinalizeExpectations& expected, int64_t tokens,
                               const std::vector<StreamView>& streams);

// FAILED_PRECONDITION: sums are imported under the id of a stream of rows.
absl::Status StreamTakenError(const std::string& stream_id);

// An open call that sends rows. Shared by the call and the sums.
struct LiveStream {
  LiveStream(std::string id, engine::DType x, engine::DType x_quantized,
             std::function<void()> on_change)
      : stream_id(std::move(id)),
        x_dtype(x),
        x_quantized_dtype(x_quantized),
        changed(std::move(on_change)) {}

  const std::string stream_id;
  const engine::DType x_dtype;
  const engine::DType x_quantized_dtype;
  // Told when the durable position moved or the stream was ended from outside.
  base::Listener changed;
};

// Sums as they were at one moment; null where there are none.
struct SumsSnapshot {
  ByteBudget::Reservation reservation;
  engine::SharedStatistics sums;
};

// Rows are folded in memory and committed, sums and positions together, from time to time. What
// was lost in memory (a chunk that failed half-way, a crash) is sent again by the streams, from
// the positions of the last commit.
//
// Owned by std::shared_ptr. What says "in the strand" runs as a task of strand(), the rest on any
// thread. Errors: NOT_FOUND once the calibration was deleted, FAILED_PRECONDITION where it is
// finalized, what the store says, UNAVAILABLE where sums in memory were lost.
class PartialSums : public std::enable_shared_from_this<PartialSums> {
 public:
  // `record` is in the catalog and open. `memory` pays for the sums; where it is empty it is taken
  // when they are loaded.
  PartialSums(const Environment& environment, CalibrationRecord record,
              ByteBudget::Reservation memory);

  // Bytes that the sums of a calibration take in memory while it is open.
  static int64_t MemoryBytes(const CalibrationRecord& record);

  const std::string& id() const { return id_; }
  Strand& strand() { return *strand_; }

  // The record with what was received since the last commit, but for its streams.
  CalibrationRecord Received() const;
  std::vector<StreamView> Streams() const;
  // What a call is told about its stream, `live` where it is the one that has the stream open; the
  // second is why it was ended, OK while it was not.
  std::pair<StreamView, absl::Status> Look(const LiveStream& live) const;
  // Whether a call is open or the time to live, counted from the last row, is not over.
  bool InUse(base::UnixMicros now) const;

  // In the strand. Makes `live` the stream's only call; one that was open before is ABORTED.
  absl::Status Open(const std::shared_ptr<LiveStream>& live);
  // In the strand. Takes rows whole or not at all; those received before are ignored.
  absl::Status Fold(LiveStream& live, int64_t sequence, std::span<const std::byte> x,
                    std::span<const std::byte> x_quantized);
  // The call is over.
  void Close(const LiveStream& live);
  // In the strand. Makes everything received durable.
  absl::Status Commit();
  // Commits in the strand, by and by, where something has waited for so long.
  void CommitIfDue(std::chrono::steady_clock::time_point now, std::chrono::milliseconds interval);

  // In the strand. Adds sums once; true if this stream was committed before.
  absl::StatusOr<bool> Import(const std::string& stream_id, bool held_out,
                              const engine::Statistics& sums);
  // In the strand. The sums of a portion.
  absl::StatusOr<SumsSnapshot> Export(bool held_out);
  // In the strand. Checks the expectations, writes the sums for the last time and ends all calls.
  absl::Status Finalize(const FinalizeExpectations& expected);
  // In the strand, after Finalize, once: the sums, and the reservation that paid for them.
  SplitSums TakeSums();
  ByteBudget::Reservation TakeMemory() { return std::move(memory_); }

  // In the strand. Ends all calls with NOT_FOUND if `remove`, which deletes the record, succeeds.
  absl::Status Remove(const std::function<absl::Status()>& remove);

 private:
  struct Stream {
    StreamRecord now;
    int64_t durable = 0;
    std::shared_ptr<LiveStream> live;
    ByteBudget::Reservation memory;
  };
  using LiveStreams = std::vector<std::shared_ptr<LiveStream>>;

  // RESOURCE_EXHAUSTED where there are so many streams that one more is refused.
  absl::Status CheckRoomFor(const std::string& stream_id) const ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  // What a new stream takes. RESOURCE_EXHAUSTED where the tenant has no memory for it.
  absl::StatusOr<ByteBudget::Reservation> ReserveStream(const std::string& stream_id) const
      ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  // The stream of this id, made where there is none.
  Stream& AddStream(const std::string& stream_id, ByteBudget::Reservation memory)
      ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  absl::Status CheckUsable() const ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  static StreamView ViewOf(const Stream& stream);
  std::vector<StreamView> ViewsOfStreams() const ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  // Ends calls from outside; returns those to tell, without the lock.
  LiveStreams EndLive(const absl::Status& reason) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  // Counts what a stream received.
  void Received(Stream& stream, int64_t fit, int64_t held_out) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  // Goes back to what is durable.
  void Restore() ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  SumsCommit CommitOfNow() const ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  // All in the strand.
  absl::Status Load();
  // Writes the sums as they are and makes `commit`, completed, the durable record.
  absl::Status Write(SumsCommit commit);
  void Lose();

  const Environment env_;
  const std::string id_;
  const std::string tenant_;
  const int64_t features_;
  const bool mismatched_;
  // Ready-made sums may be held out only where a share of the rows is.
  const bool holds_out_;
  const double fraction_;
  const int64_t block_rows_;
  const std::shared_ptr<Strand> strand_;

  mutable base::Mutex mu_;
  // Changed in the strand unless said otherwise.
  CalibrationRecord durable_ ABSL_GUARDED_BY(mu_);  // as in the catalog
  CalibrationRecord now_ ABSL_GUARDED_BY(mu_);      // with what was received since; no streams
  std::map<std::string, Stream> streams_ ABSL_GUARDED_BY(mu_);
  // What their ids and positions take in an answer, at most.
  size_t stream_bytes_ ABSL_GUARDED_BY(mu_) = 0;
  // Why a live stream was ended from outside, until its call is over.
  std::map<const LiveStream*, absl::Status> ended_ ABSL_GUARDED_BY(mu_);
  bool deleted_ ABSL_GUARDED_BY(mu_) = false;
  bool lost_ ABSL_GUARDED_BY(mu_) = false;
  bool dirty_ ABSL_GUARDED_BY(mu_) = false;
  bool commit_posted_ ABSL_GUARDED_BY(mu_) = false;  // changed on any thread
  std::chrono::steady_clock::time_point committed_at_ ABSL_GUARDED_BY(mu_);
  std::chrono::steady_clock::duration commit_took_ ABSL_GUARDED_BY(mu_){};

  // In the strand only. The reservation is declared before what it pays for.
  ByteBudget::Reservation memory_;
  std::optional<SplitAccumulator> sums_;
};

}  // namespace certiq::server

#endif  // CERTIQ_CALIBRATION_PARTIAL_SUMS_H_
