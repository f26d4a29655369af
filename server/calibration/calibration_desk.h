// The desk for calibrations: what calls ask of them.

#ifndef CERTIQ_CALIBRATION_CALIBRATION_DESK_H_
#define CERTIQ_CALIBRATION_CALIBRATION_DESK_H_

#include <chrono>
#include <cstdint>
#include <map>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "absl/base/thread_annotations.h"
#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "base/mutex.h"
#include "calibration/environment.h"
#include "calibration/partial_sums.h"
#include "calibration/split_accumulator.h"
#include "contract/limits.h"
#include "contract/paging.h"
#include "engine/linalg/damped_factor.h"
#include "runtime/reservations.h"
#include "runtime/tenant.h"

namespace certiq::server {

struct CalibrationRequest {
  std::string request_id;
  // The SHA-256 of the request's content; compared where request_id is not empty.
  std::string digest;
  int64_t features = 0;
  bool mismatched = false;
  double held_out_fraction = 0;
  int32_t sequence_rows = 0;
  std::vector<std::string> labels;
  int64_t ttl_micros = kDefaultTtlMicros;
};

// A calibration as calls see it: its record with what was received since it was written.
struct CalibrationView {
  CalibrationRecord record;
  // Left out of lists.
  std::vector<StreamView> streams;
  // What its sums take.
  int64_t bytes = 0;
  // Jobs and uploads that use it.
  int64_t jobs = 0;
};

// The truth about calibrations is in the catalog. The desk knows what only this process can: the
// sums of open calibrations that are being filled, and which calibrations uploads have pinned. A
// tenant sees its own; everything else is NOT_FOUND. Calls touch the disk. Thread-safe.
class CalibrationDesk {
 public:
  // Held by who is about to use the finalized sums: the calibration cannot be deleted meanwhile.
  class Pin {
   public:
    Pin() = default;
    Pin(Pin&& other) noexcept
        : desk_(std::exchange(other.desk_, nullptr)), record_(std::move(other.record_)) {}
    Pin& operator=(Pin&& other) noexcept {
      std::swap(desk_, other.desk_);
      std::swap(record_, other.record_);
      return *this;
    }
    ~Pin();
    explicit operator bool() const { return desk_ != nullptr; }
    const CalibrationRecord& record() const { return record_; }

   private:
    friend class CalibrationDesk;
    Pin(CalibrationDesk* desk, CalibrationRecord record)
        : desk_(desk), record_(std::move(record)) {}

    CalibrationDesk* desk_ = nullptr;
    CalibrationRecord record_;
  };

  // `commit_interval`: how long received rows may wait to become durable.
  CalibrationDesk(const Environment& environment, std::chrono::milliseconds commit_interval)
      : env_(environment), commit_interval_(commit_interval) {}

  // Reserves what a calibration takes that was there when the process started.
  void Found(const CalibrationRecord& record);

  // A new one, or the one that an earlier request with this id made.
  absl::StatusOr<CalibrationView> Create(const Tenant& tenant, const CalibrationRequest& request);
  absl::StatusOr<CalibrationView> Get(const Tenant& tenant, const std::string& id) const;
  // Newest first; only those with the label where one is given. `next_page_token` is empty on the
  // last page.
  absl::StatusOr<std::vector<CalibrationView>> List(const Tenant& tenant, const std::string& label,
                                                    const PageRequest& page,
                                                    std::string& next_page_token) const;

  absl::StatusOr<CalibrationRecord> Find(const Tenant& tenant, const std::string& id) const;
  // The sums of an open calibration in this process, made where nobody asked for them before. Null
  // where the calibration is finalized.
  absl::StatusOr<std::shared_ptr<PartialSums>> Partial(const Tenant& tenant, const std::string& id);

  // FAILED_PRECONDITION while it is open.
  absl::StatusOr<Pin> PinFinalized(const Tenant& tenant, const std::string& id);
  // The finalized sums, from memory or the store.
  absl::StatusOr<SplitSums> Sums(const CalibrationRecord& record) const;
  // Factors of the finalized sums, in the cache that all jobs share.
  std::unique_ptr<engine::FactorCache> Factors(const CalibrationRecord& record) const;

  // Adds sums once; true if this stream was committed before. `partial` is what Partial gave; where
  // it is not null this runs in its strand. So do the three below.
  absl::StatusOr<bool> Import(const Tenant& tenant, const std::string& id,
                              const std::shared_ptr<PartialSums>& partial,
                              const std::string& stream_id, bool held_out,
                              const engine::Statistics& sums);
  // The sums of a portion, null where there are none.
  absl::StatusOr<SumsSnapshot> Export(const Tenant& tenant, const std::string& id,
                                      const std::shared_ptr<PartialSums>& partial, bool held_out);
  // Ends filling; OK as well where it was finalized before and the expectations hold.
  absl::Status Finalize(const Tenant& tenant, const std::string& id,
                        const std::shared_ptr<PartialSums>& partial,
                        const FinalizeExpectations& expected);
  // FAILED_PRECONDITION while jobs or uploads use it.
  absl::Status Remove(const Tenant& tenant, const std::string& id,
                      const std::shared_ptr<PartialSums>& partial);

  // Commits what is due, deletes what expired.
  void Tick(std::chrono::steady_clock::time_point now);
  // Posts a commit for everything, at the end.
  void CommitAll();

 private:
  absl::StatusOr<CalibrationView> ViewOf(CalibrationRecord record, bool with_streams) const;
  // What `request` is answered where its request_id made `record`.
  absl::StatusOr<CalibrationView> Known(const CalibrationRecord& record,
                                        const CalibrationRequest& request) const;
  std::shared_ptr<PartialSums> KnownPartial(const std::string& id) const;
  std::vector<std::shared_ptr<PartialSums>> Partials() const;
  int64_t Pins(const std::string& id) const;
  // Deletes the record, its sums and what they took.
  absl::Status RemoveRecord(const Tenant& tenant, const std::string& id);
  void Expire(const CalibrationRecord& record, base::UnixMicros now);

  const Environment env_;
  const std::chrono::milliseconds commit_interval_;
  // What the sums take in the store.
  Reservations stored_;
  mutable base::Mutex mu_;
  std::map<std::string, std::shared_ptr<PartialSums>> partials_ ABSL_GUARDED_BY(mu_);
  std::map<std::string, int64_t> pins_ ABSL_GUARDED_BY(mu_);
};

}  // namespace certiq::server

#endif  // CERTIQ_CALIBRATION_CALIBRATION_DESK_H_
