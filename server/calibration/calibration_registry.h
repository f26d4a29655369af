// All calibrations of this server.

#ifndef CERTIQ_CALIBRATION_CALIBRATION_REGISTRY_H_
#define CERTIQ_CALIBRATION_CALIBRATION_REGISTRY_H_

#include <chrono>
#include <cstdint>
#include <map>
#include <memory>
#include <mutex>
#include <set>
#include <string>
#include <utility>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "base/status.h"
#include "calibration/calibration.h"
#include "job/paging.h"
#include "runtime/tenant.h"

namespace certiq::server {

// UNAVAILABLE with a retry delay: another call with this request_id is at it.
inline absl::Status BeingCreated() {
  absl::Status status =
      absl::UnavailableError("another call with this request_id is under way; try again");
  base::SetRetryAfter(status, base::kRetrySoon);
  return status;
}

inline constexpr int64_t kDefaultTtlMicros = int64_t{24} * 3600 * 1000000;

struct CalibrationRequest {
  std::string request_id;
  // Of the request's content; compared where request_id is not empty.
  std::string digest;
  int64_t features = 0;
  bool mismatched = false;
  double held_out_fraction = 0;
  int32_t sequence_rows = 0;
  std::vector<std::string> labels;
  int64_t ttl_micros = kDefaultTtlMicros;
};

// Thread-safe. A tenant sees its own; everything else is NOT_FOUND.
class Calibrations {
 public:
  // `commit_interval`: how long received rows may wait to become durable.
  Calibrations(const Environment& environment, std::chrono::milliseconds commit_interval)
      : env_(environment), commit_interval_(commit_interval) {}

  // What was there when the server went down.
  void Restore(std::vector<CalibrationRecord> records);

  // A new one, or the one that an earlier request with this id made. Touches the disk.
  absl::StatusOr<std::shared_ptr<Calibration>> Create(const Tenant& tenant,
                                                      const CalibrationRequest& request);
  absl::StatusOr<std::shared_ptr<Calibration>> Find(const Tenant& tenant,
                                                    const std::string& id) const;
  // For jobs found at the start. Null where it is gone.
  std::shared_ptr<Calibration> FindById(const std::string& id) const;

  // Newest first; only those with the label where one is given. INVALID_ARGUMENT for a bad token.
  absl::StatusOr<Page<CalibrationView>> List(const Tenant& tenant, const std::string& label,
                                             int32_t page_size,
                                             const std::string& page_token) const;

  // REQUIRES: called in the calibration's strand.
  absl::Status Remove(const std::shared_ptr<Calibration>& calibration);

  // Commits what is due, deletes what expired.
  void Tick(std::chrono::steady_clock::time_point now);
  // Posts a commit for everything, at the end.
  void CommitAll();

 private:
  using RequestKey = std::pair<std::string, std::string>;  // tenant, request_id

  absl::StatusOr<std::shared_ptr<Calibration>> Make(const Tenant& tenant,
                                                    const CalibrationRequest& request);
  std::vector<std::shared_ptr<Calibration>> All() const;

  const Environment env_;
  const std::chrono::milliseconds commit_interval_;
  mutable std::mutex mu_;
  // All guarded by mu_.
  std::map<std::string, std::shared_ptr<Calibration>> by_id_;
  std::map<RequestKey, std::string> by_request_;
  std::set<RequestKey> creating_;
};

}  // namespace certiq::server

#endif  // CERTIQ_CALIBRATION_CALIBRATION_REGISTRY_H_
