#include "calibration/calibration_registry.h"

#include <algorithm>

#include "absl/cleanup/cleanup.h"
#include "absl/strings/str_cat.h"
#include "base/clock.h"
#include "base/id.h"
#include "base/status.h"
#include "job/layer_intake.h"

namespace certiq::server {
namespace {

using base::InvalidField;

constexpr size_t kMaxLabels = 16;
constexpr size_t kMaxLabelBytes = 256;
constexpr int64_t kMaxSequenceRows = int64_t{1} << 24;

absl::Status Check(const CalibrationRequest& request) {
  if (request.features < 1 || request.features > kMaxFeatures) {
    return InvalidField("features",
                        absl::StrCat("expected 1 to ", kMaxFeatures, ", got ", request.features));
  }
  // A NaN is not in the range either.
  if (!(request.held_out_fraction >= 0 && request.held_out_fraction <= 0.5)) {
    return InvalidField("held_out_fraction", absl::StrCat("expected a number in [0, 0.5], got ",
                                                          request.held_out_fraction));
  }
  if (request.sequence_rows < 0 || request.sequence_rows > kMaxSequenceRows) {
    return InvalidField("sequence_rows", absl::StrCat("expected 0 to ", kMaxSequenceRows, ", got ",
                                                      request.sequence_rows));
  }
  if (request.labels.size() > kMaxLabels) {
    return InvalidField(
        "labels", absl::StrCat("expected at most ", kMaxLabels, ", got ", request.labels.size()));
  }
  for (const std::string& label : request.labels) {
    if (!label.empty() && label.size() <= kMaxLabelBytes) continue;
    return InvalidField("labels", absl::StrCat("expected 1 to ", kMaxLabelBytes,
                                               " bytes each, got ", label.size()));
  }
  return absl::OkStatus();
}

}  // namespace

void Calibrations::Restore(std::vector<CalibrationRecord> records) {
  const std::lock_guard lock(mu_);
  for (CalibrationRecord& record : records) {
    const int64_t disk = Calibration::DiskBytes(record) / (record.finalize_time == 0 ? 1 : 2);
    if (!record.request_id.empty()) by_request_[{record.tenant, record.request_id}] = record.id;
    Account& account = env_.accounts.Of(record.tenant);
    const std::string id = record.id;
    by_id_[id] = std::make_shared<Calibration>(env_, std::move(record), ByteBudget::Reservation(),
                                               account.disk.Reserve(disk));
  }
}

absl::StatusOr<std::shared_ptr<Calibration>> Calibrations::Create(
    const Tenant& tenant, const CalibrationRequest& request) {
  if (absl::Status checked = Check(request); !checked.ok()) return checked;
  if (request.request_id.empty()) return Make(tenant, request);
  const RequestKey key(tenant.name, request.request_id);
  {
    const std::lock_guard lock(mu_);
    if (const auto made = by_request_.find(key); made != by_request_.end()) {
      const std::shared_ptr<Calibration>& calibration = by_id_.at(made->second);
      if (calibration->View(false).record.request_digest == request.digest) return calibration;
      return absl::AlreadyExistsError(absl::StrCat("request_id ", request.request_id,
                                                   " made calibration ", made->second,
                                                   " from other content"));
    }
    if (!creating_.insert(key).second) return BeingCreated();
  }
  const absl::Cleanup created = [&] {
    const std::lock_guard lock(mu_);
    creating_.erase(key);
  };
  return Make(tenant, request);
}

absl::StatusOr<std::shared_ptr<Calibration>> Calibrations::Make(const Tenant& tenant,
                                                                const CalibrationRequest& request) {
  CalibrationRecord record;
  record.id = base::NewId("cal-");
  record.tenant = tenant.name;
  record.request_id = request.request_id;
  record.request_digest = request.digest;
  record.features = request.features;
  record.mismatched = request.mismatched;
  record.held_out_fraction = request.held_out_fraction;
  record.held_out_block_rows =
      request.sequence_rows > 0 ? request.sequence_rows : engine::HeldOutSplit::kBlockRows;
  record.labels = request.labels;
  record.create_time = record.update_time = base::Now();
  record.ttl_micros = request.ttl_micros;

  Account& account = env_.accounts.Of(tenant);
  auto memory = account.memory.TryReserve(Calibration::MemoryBytes(record), "this calibration");
  ByteBudget::Reservation disk;
  absl::Status status = memory.status();
  if (status.ok() && env_.store.durable()) {
    auto reserved = account.disk.TryReserve(Calibration::DiskBytes(record), "this calibration");
    status = reserved.status();
    if (reserved.ok()) disk = *std::move(reserved);
  }
  if (!status.ok()) {
    env_.observer.Rejected(Rejection::kOverBudget);
    return status;
  }
  if (absl::Status put = env_.store.PutCalibration(record); !put.ok()) return put;
  auto calibration =
      std::make_shared<Calibration>(env_, record, *std::move(memory), std::move(disk));
  const std::lock_guard lock(mu_);
  by_id_[record.id] = calibration;
  if (!record.request_id.empty()) by_request_[{record.tenant, record.request_id}] = record.id;
  return calibration;
}

std::shared_ptr<Calibration> Calibrations::FindById(const std::string& id) const {
  const std::lock_guard lock(mu_);
  const auto found = by_id_.find(id);
  return found == by_id_.end() ? nullptr : found->second;
}

absl::StatusOr<std::shared_ptr<Calibration>> Calibrations::Find(const Tenant& tenant,
                                                                const std::string& id) const {
  std::shared_ptr<Calibration> found = FindById(id);
  if (found == nullptr || found->tenant() != tenant.name) {
    return absl::NotFoundError(absl::StrCat("there is no calibration ", id));
  }
  return found;
}

std::vector<std::shared_ptr<Calibration>> Calibrations::All() const {
  const std::lock_guard lock(mu_);
  std::vector<std::shared_ptr<Calibration>> all;
  for (const auto& [id, calibration] : by_id_) all.push_back(calibration);
  return all;
}

absl::StatusOr<Page<CalibrationView>> Calibrations::List(const Tenant& tenant,
                                                         const std::string& label,
                                                         int32_t page_size,
                                                         const std::string& page_token) const {
  std::vector<CalibrationView> views;
  for (const auto& calibration : All()) {
    if (calibration->tenant() != tenant.name) continue;
    CalibrationView view = calibration->View(false);
    const std::vector<std::string>& labels = view.record.labels;
    if (!label.empty() && std::find(labels.begin(), labels.end(), label) == labels.end()) continue;
    views.push_back(std::move(view));
  }
  return CutPage(std::move(views), page_size, page_token, [](const CalibrationView& view) {
    return std::pair(view.record.create_time, view.record.id);
  });
}

absl::Status Calibrations::Remove(const std::shared_ptr<Calibration>& calibration) {
  if (absl::Status removed = calibration->Remove(); !removed.ok()) return removed;
  const std::string request_id = calibration->View(false).record.request_id;
  const std::lock_guard lock(mu_);
  by_id_.erase(calibration->id());
  if (!request_id.empty()) by_request_.erase({calibration->tenant(), request_id});
  return absl::OkStatus();
}

void Calibrations::Tick(std::chrono::steady_clock::time_point now) {
  const base::UnixMicros wall = base::Now();
  for (const auto& calibration : All()) {
    if (calibration->Expired(wall)) {
      // What fails now is tried again with the next tick.
      static_cast<void>(calibration->strand().Post({.run =
                                                        [this, calibration, wall] {
                                                          // A job may have pinned it meanwhile.
                                                          return calibration->Expired(wall)
                                                                     ? Remove(calibration)
                                                                     : absl::OkStatus();
                                                        },
                                                    .done = [](const absl::Status&) {}}));
    } else {
      calibration->CommitIfDue(now, commit_interval_);
    }
  }
}

void Calibrations::CommitAll() {
  for (const auto& calibration : All()) {
    static_cast<void>(
        calibration->strand().Post({.run = [calibration] { return calibration->Commit(); },
                                    .done = [](const absl::Status&) {}}));
  }
}

}  // namespace certiq::server
