#include "job/job_manager.h"

#include <algorithm>

#include "absl/strings/str_cat.h"
#include "base/clock.h"
#include "base/id.h"
#include "base/status.h"
#include "job/layer_intake.h"

namespace certiq::server {
namespace {

using base::InvalidField;
using base::PreconditionError;

constexpr int32_t kMaxPriority = 100;

absl::Status AlreadyExists(const std::string& request_id, const std::string& job_id) {
  return absl::AlreadyExistsError(
      absl::StrCat("request_id ", request_id, " made job ", job_id, " from other content"));
}

}  // namespace

JobUpload::~JobUpload() {
  if (!creating_) return;
  const std::lock_guard lock(manager_.mu_);
  manager_.creating_.erase({tenant_.name, request_.request_id});
}

absl::Status JobUpload::Append(int64_t row_offset, std::span<const std::byte> bytes) {
  const int64_t row_bytes = request_.features * engine::ItemSize(request_.weight_dtype);
  const absl::StatusOr<int64_t> rows = RowsIn("weight", "weight.data", row_bytes, row_offset, rows_,
                                              request_.rows, static_cast<int64_t>(bytes.size()));
  if (!rows.ok()) return rows.status();
  row_.resize(static_cast<size_t>(request_.features));
  for (int64_t r = 0; r < *rows; ++r) {
    const int64_t bad = engine::DecodeToFloat(request_.weight_dtype, bytes.data() + r * row_bytes,
                                              request_.features, row_.data());
    if (bad < 0) continue;
    return base::NonFiniteValue("weight.data", row_[static_cast<size_t>(bad)], rows_ + r, bad);
  }
  digest_.Update({reinterpret_cast<const char*>(bytes.data()), bytes.size()});
  if (writer_ != nullptr) {
    if (absl::Status written = writer_->Append(bytes); !written.ok()) return written;
  }
  rows_ += *rows;
  return absl::OkStatus();
}

absl::StatusOr<std::shared_ptr<StoredJob>> JobUpload::Finish() {
  if (rows_ != request_.rows) {
    return InvalidField("weight", absl::StrCat("expected ", request_.rows, " rows, got ", rows_,
                                               " when the stream ended"));
  }
  return manager_.Commit(*this);
}

absl::StatusOr<std::unique_ptr<JobUpload>> JobManager::Begin(const Tenant& tenant,
                                                             JobRequest request) {
  if (hold_) return absl::UnavailableError("the server is draining and takes no new work");
  if (absl::Status sizes = CheckWeight(request.rows, request.features, request.weight_dtype);
      !sizes.ok()) {
    return sizes;
  }
  if (request.priority < -kMaxPriority || request.priority > kMaxPriority) {
    return InvalidField("priority", absl::StrCat("expected -", kMaxPriority, " to ", kMaxPriority,
                                                 ", got ", request.priority));
  }
  std::unique_ptr<JobUpload> upload(new JobUpload(*this, tenant, std::move(request)));
  if (!upload->request_.request_id.empty()) {
    const RequestKey key(tenant.name, upload->request_.request_id);
    const std::lock_guard lock(mu_);
    if (const auto made = by_request_.find(key); made != by_request_.end()) {
      upload->existing_ = by_id_.at(made->second);
    } else if (creating_.insert(key).second) {
      upload->creating_ = true;
    } else {
      return BeingCreated();
    }
  }
  if (upload->existing_ != nullptr) {
    if (upload->existing_->View().record.request_digest == upload->request_.digest) return upload;
    return AlreadyExists(upload->request_.request_id, upload->existing_->id());
  }
  if (absl::Status prepared = Prepare(*upload); !prepared.ok()) return prepared;
  return upload;
}

absl::Status JobManager::Prepare(JobUpload& upload) {
  const JobRequest& request = upload.request_;
  const auto calibration = calibrations_.Find(upload.tenant_, request.calibration_id);
  if (!calibration.ok()) return calibration.status();
  absl::StatusOr<Calibration::Pin> pin = (*calibration)->PinFinalized();
  if (!pin.ok()) return pin.status();
  upload.holdings_.calibration = *std::move(pin);
  const CalibrationRecord about = (*calibration)->View(false).record;
  if (about.features != request.features) {
    return InvalidField("weight.shape",
                        absl::StrCat("expected ", about.features, " input features as calibration ",
                                     about.id, " has, got ", request.features));
  }
  if (absl::Status fits = engine::CheckSpecForLayer(request.spec, request.rows, request.features);
      !fits.ok()) {
    return fits;
  }
  if (about.tokens < request.spec.min_tokens) {
    return PreconditionError(
        "TOKENS", "spec.min_tokens",
        absl::StrCat("the spec asks for ", request.spec.min_tokens, " tokens, calibration ",
                     about.id, " has ", about.tokens));
  }
  if (request.spec.NeedsHeldOut() && about.held_out_tokens == 0) {
    return PreconditionError("HELD_OUT", "spec.damping.held_out",
                             absl::StrCat("no tokens of calibration ", about.id, " were held out"));
  }
  Account& account = env_.accounts.Of(upload.tenant_);
  absl::StatusOr<CountQuota::Place> place = account.jobs.Take("jobs");
  if (!place.ok()) {
    env_.observer.Rejected(Rejection::kQuota);
    return place.status();
  }
  upload.holdings_.place = *std::move(place);
  absl::StatusOr<WorkerPool::Slot> slot = env_.pool.Admit();
  if (!slot.ok()) {
    if (absl::IsResourceExhausted(slot.status())) env_.observer.Rejected(Rejection::kQueueFull);
    return slot.status();
  }
  upload.slot_ = *std::move(slot);

  JobRecord sizes;
  sizes.rows = request.rows;
  sizes.features = request.features;
  sizes.weight_dtype = static_cast<int32_t>(request.weight_dtype);
  sizes.spec = request.stored_spec;
  absl::Status room =
      account.memory.CheckCanFit(StoredJob::PeakBytes(sizes, request.spec, about), "this job");
  ByteBudget& store = env_.store.durable() ? account.disk : account.memory;
  if (room.ok()) {
    auto stored = store.TryReserve(StoredJob::StoredBytes(sizes, request.spec),
                                   "storing this job and its result");
    room = stored.status();
    if (stored.ok()) upload.keeps_.stored = *std::move(stored);
  }
  if (room.ok()) {
    auto record = account.memory.TryReserve(StoredJob::RecordBytes(sizes), "this job's record");
    room = record.status();
    if (record.ok()) upload.keeps_.record = *std::move(record);
  }
  if (!room.ok()) {
    env_.observer.Rejected(Rejection::kOverBudget);
    return room;
  }
  auto writer = env_.store.CreateBlob();
  if (!writer.ok()) return writer.status();
  upload.writer_ = *std::move(writer);
  return absl::OkStatus();
}

absl::StatusOr<std::shared_ptr<StoredJob>> JobManager::Commit(JobUpload& upload) {
  const JobRequest& request = upload.request_;
  const std::string sha256 = upload.digest_.Finish();
  if (upload.existing_ != nullptr) {
    if (upload.existing_->View().record.weights_sha256 == sha256) return upload.existing_;
    return AlreadyExists(request.request_id, upload.existing_->id());
  }
  absl::StatusOr<BlobRef> weights = upload.writer_->Commit();
  if (!weights.ok()) return weights.status();
  JobRecord record;
  record.id = base::NewId("job-");
  record.tenant = upload.tenant_.name;
  record.request_id = request.request_id;
  record.request_digest = request.digest;
  record.layer_name = request.layer_name;
  record.calibration_id = request.calibration_id;
  record.spec = request.stored_spec;
  record.rows = request.rows;
  record.features = request.features;
  record.weight_dtype = static_cast<int32_t>(request.weight_dtype);
  record.weights_sha256 = sha256;
  record.weights = *weights;
  record.priority = request.priority;
  record.create_time = base::Now();
  if (request.deadline_micros > 0) {
    record.deadline_time = record.create_time + request.deadline_micros;
  }
  record.ttl_micros = request.ttl_micros;
  {
    const std::lock_guard lock(mu_);
    record.number = next_number_++;
  }
  if (absl::Status put = env_.store.PutJob(record); !put.ok()) {
    env_.store.DeleteBlob(*weights);
    return put;
  }
  auto job = std::make_shared<StoredJob>(env_, codec_, record, request.spec,
                                         std::move(upload.holdings_), std::move(upload.keeps_));
  Insert(job, record);
  job->Start(std::move(upload.slot_), hold_);
  return job;
}

void JobManager::Insert(const std::shared_ptr<StoredJob>& job, const JobRecord& record) {
  const std::lock_guard lock(mu_);
  by_id_[record.id] = job;
  if (!record.request_id.empty()) by_request_[{record.tenant, record.request_id}] = record.id;
}

void JobManager::Restore(std::vector<JobRecord> records) {
  // None starts before all are queued: the first may not be the one of the highest priority.
  hold_ = true;
  for (JobRecord& record : records) {
    {
      const std::lock_guard lock(mu_);
      next_number_ = std::max(next_number_, record.number + 1);
    }
    RestoreOne(std::move(record));
  }
  hold_ = false;
  env_.pool.Poke();
}

void JobManager::RestoreOne(JobRecord record) {
  Account& account = env_.accounts.Of(record.tenant);
  if (IsFinal(record.state)) {
    StoredJob::Keeps keeps{account.disk.Reserve(record.result.bytes),
                           account.memory.Reserve(StoredJob::RecordBytes(record))};
    const auto job = std::make_shared<StoredJob>(env_, codec_, record, std::move(keeps));
    Insert(job, record);
    return;
  }
  absl::Status failed;
  StoredJob::Holdings holdings;
  absl::StatusOr<engine::ResolvedSpec> spec = codec_.DecodeSpec(record.spec);
  if (!spec.ok()) failed = spec.status();
  const std::shared_ptr<Calibration> calibration = calibrations_.FindById(record.calibration_id);
  if (calibration == nullptr) {
    failed = absl::DataLossError(
        absl::StrCat("calibration ", record.calibration_id, " is not in the store any more"));
  } else if (absl::StatusOr<Calibration::Pin> pin = calibration->PinFinalized(); pin.ok()) {
    holdings.calibration = *std::move(pin);
  } else {
    failed = pin.status();
  }
  if (record.starts >= kMaxStarts) {
    failed = absl::InternalError(absl::StrCat("the server went down ", record.starts,
                                              " times while this job ran; it is not tried again"));
  }
  const engine::ResolvedSpec resolved = spec.ok() ? *spec : engine::ResolvedSpec();
  StoredJob::Keeps keeps{account.disk.Reserve(StoredJob::StoredBytes(record, resolved)),
                         account.memory.Reserve(StoredJob::RecordBytes(record))};
  holdings.place = account.jobs.TakeAnyway();
  record.state = JobState::kQueued;
  const auto job = std::make_shared<StoredJob>(env_, codec_, record, resolved, std::move(holdings),
                                               std::move(keeps));
  Insert(job, record);
  if (failed.ok()) {
    job->Start(env_.pool.AdmitAgain(), hold_);
  } else {
    job->Fail(failed);
  }
}

std::vector<std::shared_ptr<StoredJob>> JobManager::All() const {
  const std::lock_guard lock(mu_);
  std::vector<std::shared_ptr<StoredJob>> all;
  for (const auto& [id, job] : by_id_) all.push_back(job);
  return all;
}

absl::StatusOr<std::shared_ptr<StoredJob>> JobManager::Find(const Tenant& tenant,
                                                            const std::string& id) const {
  {
    const std::lock_guard lock(mu_);
    const auto found = by_id_.find(id);
    if (found != by_id_.end() && found->second->tenant() == tenant.name) return found->second;
  }
  return absl::NotFoundError(absl::StrCat("there is no job ", id));
}

absl::StatusOr<Page<JobView>> JobManager::List(const Tenant& tenant,
                                               const std::set<JobState>& states,
                                               const std::string& calibration_id, int32_t page_size,
                                               const std::string& page_token) const {
  std::vector<JobView> views;
  for (const auto& job : All()) {
    if (job->tenant() != tenant.name) continue;
    JobView view = job->View();
    if (!states.empty() && states.count(view.record.state) == 0) continue;
    if (!calibration_id.empty() && view.record.calibration_id != calibration_id) continue;
    views.push_back(std::move(view));
  }
  return CutPage(std::move(views), page_size, page_token, [](const JobView& view) {
    return std::pair(view.record.create_time, view.record.id);
  });
}

absl::Status JobManager::Remove(const Tenant& tenant, const std::string& id) {
  const absl::StatusOr<std::shared_ptr<StoredJob>> job = Find(tenant, id);
  if (!job.ok()) return job.status();
  if (!(*job)->ended()) {
    return PreconditionError("NOT_ENDED", id, "the job has not ended; cancel it first");
  }
  const std::string request_id = (*job)->View().record.request_id;
  {
    const std::lock_guard lock(mu_);
    // Whoever takes it out of the map removes it.
    if (by_id_.erase(id) == 0) {
      return absl::NotFoundError(absl::StrCat("there is no job ", id));
    }
    if (!request_id.empty()) by_request_.erase({tenant.name, request_id});
  }
  absl::Status removed = (*job)->Remove();
  if (!removed.ok()) Insert(*job, (*job)->View().record);
  return removed;
}

void JobManager::Tick() {
  const base::UnixMicros now = base::Now();
  for (const auto& job : All()) {
    job->Retry();
    if (job->PastDeadline(now)) {
      job->Cancel(absl::StatusCode::kDeadlineExceeded);
    } else if (job->Expired(now)) {
      // What fails now is tried again with the next tick.
      static_cast<void>(Remove({job->tenant(), {}}, job->id()));
    }
  }
}

int64_t JobManager::running() const {
  const std::vector<std::shared_ptr<StoredJob>> all = All();
  return std::count_if(all.begin(), all.end(), [](const auto& job) {
    return job->View().record.state == JobState::kRunning;
  });
}

}  // namespace certiq::server
