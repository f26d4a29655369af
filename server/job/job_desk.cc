#include "job/job_desk.h"

#include <optional>
#include <utility>

#include "absl/strings/str_cat.h"
#include "base/clock.h"
#include "base/id.h"
#include "base/status.h"
#include "base/status_macros.h"
#include "contract/enums.h"
#include "contract/resolve_spec.h"
#include "job/admission.h"

namespace certiq::server {

void JobDesk::Found(const JobRecord& job) {
  env_.observer.JobEntered(job.state());
  TenantQuota& quota = env_.quotas.Of(job.tenant());
  if (IsFinal(job.state())) {
    holdings_.stored().Hold(job.id(), quota.disk.Reserve(EndedBytes(job)));
    return;
  }
  // A spec that is not understood any more ends the job when it is claimed.
  const absl::StatusOr<engine::ResolvedSpec> spec = ResolveSpec(job.spec());
  const auto dtype = FromWire(job.weight_dtype(), kDataTypes, "weight.dtype");
  holdings_.stored().Hold(job.id(),
                          quota.disk.Reserve(StoredBytes(job.rows(), job.features(),
                                                         dtype.value_or(engine::DType::kF64),
                                                         spec.value_or(engine::ResolvedSpec())) +
                                             RecordBytes(job)));
  holdings_.Hold(job.id(), quota.jobs.TakeUnchecked(), env_.pool.AdmitAgain());
}

absl::Status JobDesk::CheckSame(const JobRecord& job, const JobRequest& request,
                                const std::string* weights_sha256) const {
  const bool same = job.request_digest() == request.digest &&
                    (weights_sha256 == nullptr || job.weights_sha256() == *weights_sha256);
  if (same) return absl::OkStatus();
  return absl::AlreadyExistsError(absl::StrCat("request_id ", request.request_id, " made job ",
                                               job.id(), " from other content"));
}

absl::StatusOr<std::unique_ptr<Upload>> JobDesk::Begin(const Tenant& tenant, JobRequest request,
                                                       const engine::Cancellation& cancellation) {
  if (request.stored && !request.request_id.empty() && env_.pool.admitting()) {
    ASSIGN_OR_RETURN(std::optional<JobRecord> existing,
                     env_.storage.catalog->FindJobOfRequest(tenant.name, request.request_id));
    if (existing.has_value()) {
      RETURN_IF_ERROR(CheckSame(*existing, request, nullptr));
      return std::make_unique<Upload>(env_, std::move(request), Admission(), cancellation,
                                      std::move(existing));
    }
  }
  ASSIGN_OR_RETURN(Admission admission, Admit(env_, calibrations_, tenant, request));
  return std::make_unique<Upload>(env_, std::move(request), std::move(admission), cancellation,
                                  std::nullopt);
}

absl::StatusOr<JobView> JobDesk::Add(const Tenant& tenant, Upload& upload) {
  const JobRequest& request = upload.request();
  const std::string& sha256 = upload.facts().weights_sha256;
  if (upload.existing().has_value()) {
    RETURN_IF_ERROR(CheckSame(*upload.existing(), request, &sha256));
    return Get(tenant, upload.existing()->id());
  }
  ASSIGN_OR_RETURN(const BlobRef weights, upload.CommitWeights());
  JobRecord job;
  job.set_id(base::NewId("job-"));
  job.set_tenant(tenant.name);
  job.set_request_id(request.request_id);
  job.set_request_digest(request.digest);
  job.set_layer_name(request.layer_name);
  job.set_calibration_id(request.calibration_id);
  *job.mutable_spec() = request.spec_message;
  job.set_rows(request.rows);
  job.set_features(request.features);
  job.set_weight_dtype(ToWire(request.weight_dtype, kDataTypes));
  job.set_weights_sha256(sha256);
  *job.mutable_weights() = weights;
  job.set_priority(request.priority);
  job.set_create_time(base::Now());
  if (request.deadline_micros > 0) {
    job.set_deadline_time(job.create_time() + request.deadline_micros);
  }
  job.set_ttl_micros(request.ttl_micros);
  job.set_state(v1::JOB_STATE_QUEUED);
  // Before it is in the catalog: it may be claimed as soon as it is.
  Admission& admission = upload.admission();
  holdings_.Hold(job.id(), std::move(admission.permit), std::move(admission.slot));
  holdings_.stored().Hold(job.id(), std::move(admission.storage));
  absl::StatusOr<JobChange> added = env_.storage.catalog->AddJob(job);
  if (!added.ok() || !added->changed) {
    holdings_.Release(job.id());
    holdings_.stored().Release(job.id());
    env_.storage.Forget(weights);
    RETURN_IF_ERROR(added.status());
    // Another call with this request_id came first.
    RETURN_IF_ERROR(CheckSame(added->job, request, &sha256));
    return ViewOf(std::move(added->job));
  }
  // The job itself keeps the calibration from now on.
  admission.calibration = CalibrationDesk::Pin();
  events_.Changed(*added);
  runner_.Poke(job.priority());
  return ViewOf(std::move(added->job));
}

JobView JobDesk::ViewOf(JobRecord job) const {
  JobView view;
  if (const std::optional<JobProgress> progress = runner_.ProgressOf(job.id());
      progress.has_value()) {
    view.progress = *progress;
  }
  view.queue_position = env_.storage.catalog->Ahead(job).value_or(-1);
  view.record = std::move(job);
  return view;
}

absl::StatusOr<JobView> JobDesk::Get(const Tenant& tenant, const std::string& id) const {
  ASSIGN_OR_RETURN(JobRecord job, env_.storage.catalog->FindJob(tenant.name, id));
  return ViewOf(std::move(job));
}

absl::StatusOr<std::vector<JobView>> JobDesk::List(const Tenant& tenant,
                                                   std::vector<JobState> states,
                                                   const std::string& calibration_id,
                                                   const PageRequest& page,
                                                   std::string& next_page_token) const {
  ASSIGN_OR_RETURN(
      std::vector<JobRecord> jobs,
      env_.storage.catalog->Jobs(
          {.tenant = tenant.name, .states = std::move(states), .calibration_id = calibration_id},
          page.after, page.size + 1));
  next_page_token = CutPage(page, jobs);
  std::vector<JobView> views;
  views.reserve(jobs.size());
  for (JobRecord& job : jobs) views.push_back(ViewOf(std::move(job)));
  return views;
}

absl::StatusOr<JobView> JobDesk::Cancel(const Tenant& tenant, const std::string& id,
                                        absl::StatusCode reason) {
  ASSIGN_OR_RETURN(JobRecord job, runner_.Cancel(tenant.name, id, reason));
  if (IsFinal(job.state())) return ViewOf(std::move(job));
  // One that was claimed and waited has ended meanwhile.
  return Get(tenant, id);
}

absl::Status JobDesk::Remove(const Tenant& tenant, const std::string& id) {
  ASSIGN_OR_RETURN(const JobRecord removed, env_.storage.catalog->RemoveJob(tenant.name, id));
  env_.observer.JobLeft(removed.state());
  env_.storage.Forget(removed.result().blob());
  holdings_.stored().Release(id);
  events_.Notify(id);
  return absl::OkStatus();
}

absl::StatusOr<std::unique_ptr<ResultReader>> JobDesk::OpenResult(const Tenant& tenant,
                                                                  const std::string& id,
                                                                  int64_t byte_offset) const {
  ASSIGN_OR_RETURN(const JobRecord job, env_.storage.catalog->FindJob(tenant.name, id));
  if (job.state() != v1::JOB_STATE_SUCCEEDED) {
    return base::PreconditionError(
        "NOT_SUCCEEDED", id,
        absl::StrCat("the job is ", NameOf(job.state()), ", only one that succeeded has a result"));
  }
  const ResultRecord& result = job.result();
  if (byte_offset < 0 || byte_offset > result.tensor_bytes()) {
    return base::InvalidField("byte_offset", absl::StrCat("expected 0 to ", result.tensor_bytes(),
                                                          ", got ", byte_offset));
  }
  ASSIGN_OR_RETURN(std::unique_ptr<BlobReader> blob, env_.storage.blobs->Open(result.blob()));
  return std::make_unique<ResultReader>(result, std::move(blob), byte_offset);
}

void JobDesk::Tick() {
  runner_.Tick();
  const base::UnixMicros now = base::Now();
  // What fails now is tried again with the next tick.
  if (const auto overdue = env_.storage.catalog->OverdueJobs(now); overdue.ok()) {
    for (const JobRecord& job : *overdue) {
      Cancel({job.tenant(), {}}, job.id(), absl::StatusCode::kDeadlineExceeded)
          .status()
          .IgnoreError();
    }
  }
  if (const auto expired = env_.storage.catalog->ExpiredJobs(now); expired.ok()) {
    for (const JobRecord& job : *expired) {
      Remove({job.tenant(), {}}, job.id()).IgnoreError();
    }
  }
}

}  // namespace certiq::server
