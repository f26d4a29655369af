#include "calibration/calibration_desk.h"

#include <bit>
#include <functional>
#include <optional>

#include "absl/strings/str_cat.h"
#include "base/clock.h"
#include "base/id.h"
#include "base/status.h"
#include "base/status_macros.h"
#include "calibration/gram_file.h"

namespace certiq::server {
namespace {

using base::InvalidField;

constexpr size_t kMaxLabels = 16;
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
    if (!label.empty() && label.size() <= kMaxNameBytes) continue;
    return InvalidField(
        "labels", absl::StrCat("expected 1 to ", kMaxNameBytes, " bytes each, got ", label.size()));
  }
  return absl::OkStatus();
}

std::string CachePrefix(const CalibrationRecord& record) {
  return absl::StrCat("calibration/", record.id(), "/");
}

class CalibrationFactors final : public engine::FactorCache {
 public:
  CalibrationFactors(const Environment& environment, std::string prefix, int64_t features)
      : env_(environment), prefix_(std::move(prefix)), features_(features) {}

  absl::StatusOr<engine::SharedFactor> Get(
      const engine::FactorKey& key,
      const std::function<absl::StatusOr<engine::DampedFactor>()>& make) override {
    const auto made = [&]() -> absl::StatusOr<SharedCache::Value> {
      ASSIGN_OR_RETURN(engine::DampedFactor factor, make());
      return SharedCache::Value(std::make_shared<const engine::DampedFactor>(std::move(factor)));
    };
    const int64_t bytes = engine::UpperTriangle<double>::ElementsFor(features_) * 8 + features_ * 8;
    ASSIGN_OR_RETURN(
        const SharedCache::Found found,
        env_.cache.Get(absl::StrCat(prefix_, static_cast<int>(key.order), "/", key.with_held_out,
                                    "/", absl::Hex(std::bit_cast<uint64_t>(key.lambda)), "/",
                                    static_cast<int>(key.use), "/", key.max_attempts, "/",
                                    absl::Hex(std::bit_cast<uint64_t>(key.growth))),
                       bytes, made));
    env_.observer.FactorAsked(found.shared);
    return std::static_pointer_cast<const engine::DampedFactor>(found.value);
  }

 private:
  const Environment env_;
  const std::string prefix_;
  const int64_t features_;
};

// The bytes on disk, while one generation of the sums replaces another.
int64_t DiskBytes(const CalibrationRecord& record) {
  return (record.finalize_time() == 0 ? 2 : 1) * BlobBytes(SumsBytes(record)) + RecordBytes(record);
}

std::vector<StreamView> StreamsOf(const CalibrationRecord& record) {
  std::vector<StreamView> views;
  for (const StreamRecord& stream : record.streams()) {
    views.push_back({.id = stream.id(),
                     .received = stream.sequence(),
                     .durable = stream.sequence(),
                     .tokens = stream.tokens(),
                     .live = false,
                     .imported = stream.imported()});
  }
  return views;
}

}  // namespace

CalibrationDesk::Pin::~Pin() {
  if (desk_ == nullptr) return;
  const base::MutexLock lock(desk_->mu_);
  if (--desk_->pins_[record_.id()] == 0) desk_->pins_.erase(record_.id());
}

void CalibrationDesk::Found(const CalibrationRecord& record) {
  if (!env_.storage.catalog->durable()) return;
  stored_.Hold(record.id(), env_.quotas.Of(record.tenant()).disk.Reserve(DiskBytes(record)));
}

absl::StatusOr<CalibrationView> CalibrationDesk::Create(const Tenant& tenant,
                                                        const CalibrationRequest& request) {
  RETURN_IF_ERROR(Check(request));
  CalibrationRecord record;
  record.set_id(base::NewId("cal-"));
  record.set_tenant(tenant.name);
  record.set_request_id(request.request_id);
  record.set_request_digest(request.digest);
  record.set_features(request.features);
  record.set_mismatched(request.mismatched);
  record.set_held_out_fraction(request.held_out_fraction);
  record.set_held_out_block_rows(request.sequence_rows > 0 ? request.sequence_rows
                                                           : engine::HeldOutSplit::kBlockRows);
  record.mutable_labels()->Assign(request.labels.begin(), request.labels.end());
  record.set_create_time(base::Now());
  record.set_update_time(record.create_time());
  record.set_ttl_micros(request.ttl_micros);

  Catalog& catalog = *env_.storage.catalog;
  if (!request.request_id.empty()) {
    // Before room is asked for: the one that was made needs none.
    ASSIGN_OR_RETURN(const std::optional<CalibrationRecord> known,
                     catalog.FindCalibrationOfRequest(tenant.name, request.request_id));
    if (known.has_value()) return Known(*known, request);
  }
  TenantQuota& quota = env_.quotas.Of(tenant);
  auto memory = quota.memory.TryReserve(PartialSums::MemoryBytes(record), "this calibration");
  absl::Status room = memory.status();
  ByteBudget::Reservation disk;
  if (room.ok() && catalog.durable()) {
    auto reserved = quota.disk.TryReserve(DiskBytes(record), "this calibration");
    room = reserved.status();
    if (reserved.ok()) disk = *std::move(reserved);
  }
  if (!room.ok()) {
    env_.observer.Rejected(Rejection::kOverBudget);
    return room;
  }
  CalibrationRecord added;
  {
    // With the lock: whoever finds the record at once finds its sums too, and who deletes it gives
    // back what it holds.
    const base::MutexLock lock(mu_);
    ASSIGN_OR_RETURN(added, catalog.AddCalibration(record));
    if (added.id() == record.id()) {
      stored_.Hold(record.id(), std::move(disk));
      partials_[record.id()] = std::make_shared<PartialSums>(env_, record, *std::move(memory));
    }
  }
  if (added.id() != record.id()) return Known(added, request);
  return ViewOf(std::move(added), /*with_streams=*/true);
}

absl::StatusOr<CalibrationView> CalibrationDesk::Known(const CalibrationRecord& record,
                                                       const CalibrationRequest& request) const {
  if (record.request_digest() == request.digest) return ViewOf(record, /*with_streams=*/true);
  return absl::AlreadyExistsError(absl::StrCat(
      "request_id ", request.request_id, " made calibration ", record.id(), " from other content"));
}

std::shared_ptr<PartialSums> CalibrationDesk::KnownPartial(const std::string& id) const {
  const base::MutexLock lock(mu_);
  const auto found = partials_.find(id);
  return found == partials_.end() ? nullptr : found->second;
}

std::vector<std::shared_ptr<PartialSums>> CalibrationDesk::Partials() const {
  const base::MutexLock lock(mu_);
  std::vector<std::shared_ptr<PartialSums>> all;
  for (const auto& [id, partial] : partials_) all.push_back(partial);
  return all;
}

int64_t CalibrationDesk::Pins(const std::string& id) const {
  const base::MutexLock lock(mu_);
  const auto found = pins_.find(id);
  return found == pins_.end() ? 0 : found->second;
}

absl::StatusOr<CalibrationView> CalibrationDesk::ViewOf(CalibrationRecord record,
                                                        bool with_streams) const {
  CalibrationView view;
  view.bytes = SumsBytes(record);
  ASSIGN_OR_RETURN(view.jobs, env_.storage.catalog->UnfinishedJobs(record.id()));
  view.jobs += Pins(record.id());
  const std::shared_ptr<PartialSums> partial =
      record.finalize_time() == 0 ? KnownPartial(record.id()) : nullptr;
  if (partial != nullptr) {
    view.record = partial->Received();
    if (with_streams) view.streams = partial->Streams();
  } else {
    if (with_streams) view.streams = StreamsOf(record);
    view.record = std::move(record);
    view.record.clear_streams();
  }
  return view;
}

absl::StatusOr<CalibrationRecord> CalibrationDesk::Find(const Tenant& tenant,
                                                        const std::string& id) const {
  return env_.storage.catalog->FindCalibration(tenant.name, id);
}

absl::StatusOr<CalibrationView> CalibrationDesk::Get(const Tenant& tenant,
                                                     const std::string& id) const {
  ASSIGN_OR_RETURN(CalibrationRecord record, Find(tenant, id));
  return ViewOf(std::move(record), /*with_streams=*/true);
}

absl::StatusOr<std::vector<CalibrationView>> CalibrationDesk::List(
    const Tenant& tenant, const std::string& label, const PageRequest& page,
    std::string& next_page_token) const {
  ASSIGN_OR_RETURN(std::vector<CalibrationRecord> records,
                   env_.storage.catalog->Calibrations({.tenant = tenant.name, .label = label},
                                                      page.after, page.size + 1));
  next_page_token = CutPage(page, records);
  std::vector<CalibrationView> views;
  for (CalibrationRecord& record : records) {
    ASSIGN_OR_RETURN(views.emplace_back(), ViewOf(std::move(record), /*with_streams=*/false));
  }
  return views;
}

absl::StatusOr<std::shared_ptr<PartialSums>> CalibrationDesk::Partial(const Tenant& tenant,
                                                                      const std::string& id) {
  // The record is read with the lock held: whoever finalizes or deletes it takes its sums out of
  // the map after that is written, so that none are made of an older record.
  const base::MutexLock lock(mu_);
  ASSIGN_OR_RETURN(CalibrationRecord record, Find(tenant, id));
  if (record.finalize_time() != 0) return std::shared_ptr<PartialSums>();
  std::shared_ptr<PartialSums>& partial = partials_[id];
  if (partial == nullptr) {
    partial = std::make_shared<PartialSums>(env_, std::move(record), ByteBudget::Reservation());
  }
  return partial;
}

absl::StatusOr<CalibrationDesk::Pin> CalibrationDesk::PinFinalized(const Tenant& tenant,
                                                                   const std::string& id) {
  // With the lock, as in RemoveRecord: one of the two sees the other.
  const base::MutexLock lock(mu_);
  ASSIGN_OR_RETURN(CalibrationRecord record, Find(tenant, id));
  RETURN_IF_ERROR(CheckFinalized(record));
  ++pins_[id];
  return Pin(this, std::move(record));
}

absl::StatusOr<SplitSums> CalibrationDesk::Sums(const CalibrationRecord& record) const {
  const auto read = [&]() -> absl::StatusOr<SharedCache::Value> {
    ASSIGN_OR_RETURN(LoadedSums loaded, ReadSums(*env_.storage.blobs, record));
    const auto sums = std::make_shared<SplitSums>();
    sums->fit = std::make_shared<const engine::Statistics>(std::move(loaded.fit));
    if (loaded.held_out.has_value()) {
      sums->held_out = std::make_shared<const engine::Statistics>(*std::move(loaded.held_out));
    }
    return SharedCache::Value(sums);
  };
  ASSIGN_OR_RETURN(const SharedCache::Found found,
                   env_.cache.Get(absl::StrCat(CachePrefix(record), "sums"),
                                  PartialSums::MemoryBytes(record), read));
  const auto shared = std::static_pointer_cast<const SplitSums>(found.value);
  // The parts keep the whole, and its reservation.
  SplitSums sums;
  sums.fit = engine::SharedStatistics(shared, shared->fit.get());
  if (shared->held_out != nullptr) {
    sums.held_out = engine::SharedStatistics(shared, shared->held_out.get());
  }
  return sums;
}

std::unique_ptr<engine::FactorCache> CalibrationDesk::Factors(
    const CalibrationRecord& record) const {
  return std::make_unique<CalibrationFactors>(env_, absl::StrCat(CachePrefix(record), "factor/"),
                                              record.features());
}

absl::StatusOr<bool> CalibrationDesk::Import(const Tenant& tenant, const std::string& id,
                                             const std::shared_ptr<PartialSums>& partial,
                                             const std::string& stream_id, bool held_out,
                                             const engine::Statistics& sums) {
  ASSIGN_OR_RETURN(const CalibrationRecord record, Find(tenant, id));
  if (record.finalize_time() == 0) return partial->Import(stream_id, held_out, sums);
  // It takes nothing more, but says of what it has.
  for (const StreamRecord& stream : record.streams()) {
    if (stream.id() != stream_id) continue;
    if (stream.imported()) return true;
    return StreamTakenError(stream_id);
  }
  return FinalizedError();
}

absl::StatusOr<SumsSnapshot> CalibrationDesk::Export(const Tenant& tenant, const std::string& id,
                                                     const std::shared_ptr<PartialSums>& partial,
                                                     bool held_out) {
  ASSIGN_OR_RETURN(const CalibrationRecord record, Find(tenant, id));
  if (record.finalize_time() == 0) return partial->Export(held_out);
  ASSIGN_OR_RETURN(SplitSums sums, Sums(record));
  SumsSnapshot snapshot;
  snapshot.sums = held_out ? std::move(sums.held_out) : std::move(sums.fit);
  return snapshot;
}

absl::Status CalibrationDesk::Finalize(const Tenant& tenant, const std::string& id,
                                       const std::shared_ptr<PartialSums>& partial,
                                       const FinalizeExpectations& expected) {
  ASSIGN_OR_RETURN(CalibrationRecord record, Find(tenant, id));
  if (record.finalize_time() != 0) {
    return CheckExpectations(expected, record.tokens() + record.held_out_tokens(),
                             StreamsOf(record));
  }
  RETURN_IF_ERROR(partial->Finalize(expected));
  record = partial->Received();
  // The first job will want the sums; they are in the store, so they may go.
  const auto sums = std::make_shared<SplitSums>(partial->TakeSums());
  ByteBudget::Reservation memory = partial->TakeMemory();
  // With the streams that it has now.
  ASSIGN_OR_RETURN(record, Find(tenant, id));
  TenantQuota& quota = env_.quotas.Of(tenant.name);
  const bool durable = env_.storage.catalog->durable();
  memory.Release();
  ByteBudget::Reservation stored =
      durable ? quota.disk.Reserve(DiskBytes(record))
              : quota.memory.Reserve(SumsBytes(record) + RecordBytes(record));
  {
    // With the lock: who deletes it gives back what it holds.
    const base::MutexLock lock(mu_);
    // It was deleted since it was finalized.
    if (partials_.erase(id) == 0) return absl::OkStatus();
    stored_.Hold(id, std::move(stored));
  }
  return env_.cache
      .Get(absl::StrCat(CachePrefix(record), "sums"), PartialSums::MemoryBytes(record),
           [&]() -> absl::StatusOr<SharedCache::Value> { return SharedCache::Value(sums); })
      .status();
}

absl::Status CalibrationDesk::RemoveRecord(const Tenant& tenant, const std::string& id) {
  CalibrationRecord removed;
  {
    const base::MutexLock lock(mu_);
    if (const auto pins = pins_.find(id); pins != pins_.end()) {
      ASSIGN_OR_RETURN(const CalibrationRecord record, Find(tenant, id));
      ASSIGN_OR_RETURN(const int64_t jobs, env_.storage.catalog->UnfinishedJobs(id));
      RETURN_IF_ERROR(CheckRemovable(record, jobs + pins->second));
    }
    ASSIGN_OR_RETURN(removed, env_.storage.catalog->RemoveCalibration(tenant.name, id));
    partials_.erase(id);
  }
  env_.storage.Forget(removed.sums());
  env_.cache.Drop(CachePrefix(removed));
  stored_.Release(id);
  return absl::OkStatus();
}

absl::Status CalibrationDesk::Remove(const Tenant& tenant, const std::string& id,
                                     const std::shared_ptr<PartialSums>& partial) {
  if (partial == nullptr) return RemoveRecord(tenant, id);
  return partial->Remove([&] { return RemoveRecord(tenant, id); });
}

void CalibrationDesk::Expire(const CalibrationRecord& record, base::UnixMicros now) {
  const Tenant tenant{record.tenant(), {}};
  // What fails now, because a job uses it for example, is tried again with the next tick.
  if (record.finalize_time() != 0) {
    Remove(tenant, record.id(), nullptr).IgnoreError();
    return;
  }
  // In the strand even where no call has opened a stream yet: one may at any moment.
  const absl::StatusOr<std::shared_ptr<PartialSums>> found = Partial(tenant, record.id());
  // It may have been finalized or deleted meanwhile.
  if (!found.ok() || *found == nullptr || (*found)->InUse(now)) return;
  const std::shared_ptr<PartialSums>& partial = *found;
  static_cast<void>(partial->strand().Post({.run = [this, tenant, partial, now]() -> absl::Status {
                                              // A call may have opened a stream meanwhile.
                                              if (partial->InUse(now)) return absl::OkStatus();
                                              return Remove(tenant, partial->id(), partial);
                                            },
                                            .done = [](const absl::Status&) {}}));
}

void CalibrationDesk::Tick(std::chrono::steady_clock::time_point now) {
  const base::UnixMicros wall = base::Now();
  if (const auto expired = env_.storage.catalog->ExpiredCalibrations(wall); expired.ok()) {
    for (const CalibrationRecord& record : *expired) Expire(record, wall);
  }
  for (const auto& partial : Partials()) partial->CommitIfDue(now, commit_interval_);
}

void CalibrationDesk::CommitAll() {
  for (const auto& partial : Partials()) {
    static_cast<void>(partial->strand().Post(
        {.run = [partial] { return partial->Commit(); }, .done = [](const absl::Status&) {}}));
  }
}

}  // namespace certiq::server
