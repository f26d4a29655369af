// A calibration: the sums of one input space, and who has sent what into them.

#ifndef CERTIQ_CALIBRATION_CALIBRATION_H_
#define CERTIQ_CALIBRATION_CALIBRATION_H_

#include <chrono>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <optional>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "base/clock.h"
#include "base/listener.h"
#include "engine/damping/damping.h"
#include "engine/gram/gram.h"
#include "engine/gram/held_out_split.h"
#include "engine/kernels/dtype.h"
#include "observability/observer.h"
#include "runtime/byte_budget.h"
#include "runtime/shared_cache.h"
#include "runtime/strand.h"
#include "runtime/tenant_quota.h"
#include "runtime/worker_pool.h"
#include "store/store.h"

namespace certiq::server {

// What calibrations and jobs work with; all of it outlives them.
struct Environment {
  WorkerPool& pool;
  Store& store;
  SharedCache& cache;
  Accounts& accounts;
  Observer& observer;
  // Told once of every stored job that ended, and why; may be null. Does not block.
  std::function<void(const JobRecord&, const absl::Status&)> job_log = nullptr;
};

// How far a stream is; see StreamProgress in the contract.
struct StreamView {
  std::string id;
  int64_t received = 0;
  int64_t durable = 0;
  int64_t tokens = 0;
  bool live = false;
  bool imported = false;
};

struct CalibrationView {
  // As it is now; its streams are in `streams`.
  CalibrationRecord record;
  std::vector<StreamView> streams;
  int64_t bytes = 0;
  base::UnixMicros expire_time = 0;
  // Jobs that use it.
  int64_t jobs = 0;
};

// An open call that sends rows. Shared by the call and the calibration.
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

// Sums that never change again. `held_out` is null where nothing was held out.
struct CalibrationSums {
  engine::SharedStatistics fit;
  engine::SharedStatistics held_out;
  std::string sha256;
};

// Sums as they were at one moment.
struct Snapshot {
  ByteBudget::Reservation reservation;
  engine::SharedStatistics sums;
};

// Owned by std::shared_ptr. What says "in the strand" runs as a task of strand(), the rest on any
// thread. Errors: NOT_FOUND once it was deleted, FAILED_PRECONDITION where its state forbids it,
// what the store says, UNAVAILABLE where sums in memory were lost.
class Calibration : public std::enable_shared_from_this<Calibration> {
 public:
  // Held by who uses the finalized sums: it cannot be deleted meanwhile.
  class Pin {
   public:
    Pin() = default;
    explicit Pin(std::shared_ptr<Calibration> calibration) : calibration_(std::move(calibration)) {}
    Pin(Pin&&) noexcept = default;
    Pin& operator=(Pin&& other) noexcept {
      calibration_.swap(other.calibration_);
      return *this;
    }
    ~Pin();
    Calibration* operator->() const { return calibration_.get(); }
    const std::shared_ptr<Calibration>& get() const { return calibration_; }

   private:
    std::shared_ptr<Calibration> calibration_;
  };

  // `record` is in the store. Reservations for its sums in memory and on disk; the first may be
  // empty: it is taken when they are loaded.
  Calibration(const Environment& environment, CalibrationRecord record,
              ByteBudget::Reservation memory, ByteBudget::Reservation disk);

  // Bytes its sums take in memory while it is open, and on disk while one generation replaces
  // another.
  static int64_t MemoryBytes(const CalibrationRecord& record);
  static int64_t DiskBytes(const CalibrationRecord& record);

  const std::string& id() const { return id_; }
  const std::string& tenant() const { return tenant_; }
  int64_t features() const { return features_; }
  bool mismatched() const { return mismatched_; }
  Strand& strand() { return *strand_; }

  CalibrationView View(bool with_streams) const;
  // What a call is told about its stream; the second is why it was ended, OK while it was not.
  std::pair<StreamView, absl::Status> Look(const LiveStream& live) const;

  // FAILED_PRECONDITION while it is open.
  absl::StatusOr<Pin> PinFinalized();
  // The finalized sums, from memory or the store. REQUIRES: pinned.
  absl::StatusOr<CalibrationSums> Sums();
  // Factors of these sums. Valid as long as it is pinned.
  std::unique_ptr<engine::FactorCache> Factors();

  // In the strand. Makes `live` the stream's only call; one that was open before is ABORTED.
  absl::Status Open(const std::shared_ptr<LiveStream>& live);
  // In the strand. Takes rows whole or not at all; those received before are ignored.
  absl::Status Fold(LiveStream& live, int64_t sequence, std::span<const std::byte> x,
                    std::span<const std::byte> x_quantized);
  // The call is over. Any thread.
  void Close(const LiveStream& live);
  // In the strand. Makes everything received durable.
  absl::Status Commit();
  // Commits in the strand, by and by, where something has waited for so long. Any thread.
  void CommitIfDue(std::chrono::steady_clock::time_point now, std::chrono::milliseconds interval);

  // In the strand. Adds sums once; true if this stream was committed before.
  absl::StatusOr<bool> Import(const std::string& stream_id, bool held_out,
                              const engine::Statistics& sums);
  // In the strand. The sums of a portion; null where there are none.
  absl::StatusOr<Snapshot> Export(bool held_out);
  // In the strand. Expectations as FinalizeCalibrationRequest has them.
  absl::Status Finalize(std::optional<int64_t> expected_tokens,
                        const std::vector<std::string>& expected_streams);

  // In the strand. Forgets it, in the store too. FAILED_PRECONDITION while it is pinned.
  absl::Status Remove();
  bool Expired(base::UnixMicros now) const;

 private:
  struct Stream {
    StreamRecord now;
    int64_t durable = 0;
    std::shared_ptr<LiveStream> live;
  };

  // 2 where rows are held out.
  static int64_t Portions(const CalibrationRecord& record) {
    return record.held_out_fraction > 0 ? 2 : 1;
  }
  // RESOURCE_EXHAUSTED where there are so many streams that one more is refused. Needs mu_.
  absl::Status CheckRoomFor(const std::string& stream_id) const;
  // What a call is told that comes too late.
  static absl::Status IsFinalized();
  absl::Status Usable() const;                    // needs mu_
  StreamView ViewOf(const Stream& stream) const;  // needs mu_
  // Ends calls from outside; returns those to tell, without the lock. Needs mu_.
  std::vector<std::shared_ptr<LiveStream>> EndLive(const absl::Status& reason);
  // All in the strand.
  absl::Status Load();
  absl::Status FoldRows(const LiveStream& live, int64_t first_row, int64_t rows, const std::byte* x,
                        const std::byte* x_quantized, int64_t& held_out_rows);
  // Writes `next`, with the sums as they are, and makes it the durable record.
  absl::Status Write(CalibrationRecord next);
  absl::StatusOr<BlobRef> WriteSums(std::string& sha256);
  void Lose();
  std::string SumsKey() const { return "calibration/" + id_ + "/sums"; }

  const Environment env_;
  const std::string id_;
  const std::string tenant_;
  const int64_t features_;
  const bool mismatched_;
  const bool holds_out_;
  const double fraction_;
  const int64_t block_rows_;
  const std::shared_ptr<Strand> strand_;

  mutable std::mutex mu_;
  // All guarded by mu_, changed in the strand unless said otherwise.
  CalibrationRecord durable_;  // as in the store
  CalibrationRecord now_;      // with what was received since; no streams
  std::map<std::string, Stream> streams_;
  // Why a live stream was ended from outside, until its call is over.
  std::map<const LiveStream*, absl::Status> ended_;
  int64_t pins_ = 0;  // any thread
  bool deleted_ = false;
  bool lost_ = false;
  bool dirty_ = false;
  bool commit_posted_ = false;  // any thread
  std::chrono::steady_clock::time_point committed_at_;
  std::chrono::steady_clock::duration commit_took_{};

  // In the strand only. Declared before what they pay for.
  ByteBudget::Reservation memory_;
  ByteBudget::Reservation disk_;
  std::optional<engine::StatisticsAccumulator> fit_;
  std::optional<engine::StatisticsAccumulator> held_out_;
  // Finalized sums of a store that keeps nothing: this is the only copy. Guarded by mu_.
  std::shared_ptr<const CalibrationSums> kept_;
};

}  // namespace certiq::server

#endif  // CERTIQ_CALIBRATION_CALIBRATION_H_
