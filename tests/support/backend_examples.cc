#include "support/backend_examples.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <chrono>
#include <cmath>
#include <condition_variable>
#include <mutex>
#include <set>

#include "base/status_macros.h"
#include "store/memory_blobs.h"
#include "store/sqlite_catalog.h"
#include "support/gate.h"

namespace certiq::server::testing {
namespace {

using certiq::testing::Gate;
using certiq::testing::kPatience;
using certiq::testing::Layer;
using certiq::testing::RowBytes;

absl::Status PlannedFailure(int code) {
  return absl::Status(static_cast<absl::StatusCode>(code), "the disk fails as planned");
}

class WatchedWriter final : public BlobWriter {
 public:
  WatchedWriter(std::unique_ptr<BlobWriter> inner, StorePlan& plan)
      : inner_(std::move(inner)), plan_(plan) {}

  absl::Status Append(std::span<const std::byte> bytes) override { return inner_->Append(bytes); }
  absl::StatusOr<BlobRef> Commit() override {
    RETURN_IF_ERROR(plan_.Write(StoreWrite::kCommitBlob));
    return inner_->Commit();
  }

 private:
  const std::unique_ptr<BlobWriter> inner_;
  StorePlan& plan_;
};

// Passes on to another, unless the plan has it fail.
class WatchedBlobs final : public Blobs {
 public:
  WatchedBlobs(std::shared_ptr<Blobs> inner, StorePlan& plan)
      : inner_(std::move(inner)), plan_(plan) {}

  absl::StatusOr<std::unique_ptr<BlobWriter>> Create() override {
    RETURN_IF_ERROR(plan_.Write(StoreWrite::kCreateBlob));
    ASSIGN_OR_RETURN(std::unique_ptr<BlobWriter> writer, inner_->Create());
    return std::make_unique<WatchedWriter>(std::move(writer), plan_);
  }
  absl::StatusOr<std::unique_ptr<BlobReader>> Open(const BlobRef& blob) override {
    return inner_->Open(blob);
  }
  absl::Status HasRoom(int64_t bytes) override {
    return plan_.no_room ? absl::ResourceExhaustedError("no room, as planned")
                         : inner_->HasRoom(bytes);
  }
  void Remove(const BlobRef& blob) override { inner_->Remove(blob); }
  absl::Status RemoveAllBut(const std::set<std::string>& names) override {
    return inner_->RemoveAllBut(names);
  }

 private:
  const std::shared_ptr<Blobs> inner_;
  StorePlan& plan_;
};

class WatchedCatalog final : public Catalog {
 public:
  WatchedCatalog(std::shared_ptr<Catalog> inner, bool stays, StorePlan& plan)
      : inner_(std::move(inner)), stays_(stays), plan_(plan) {}

  bool durable() const override { return stays_; }
  bool settled() const override { return inner_->settled(); }
  absl::Status Register(const std::string& replica, base::UnixMicros now,
                        absl::FunctionRef<void(const CalibrationRecord&)> calibration,
                        absl::FunctionRef<void(const JobRecord&)> job) override {
    return inner_->Register(replica, now, calibration, job);
  }

  absl::StatusOr<CalibrationRecord> AddCalibration(const CalibrationRecord& record) override {
    RETURN_IF_ERROR(plan_.Write(StoreWrite::kAddCalibration));
    return inner_->AddCalibration(record);
  }
  absl::StatusOr<CalibrationRecord> FindCalibration(const std::string& tenant,
                                                    const std::string& id) override {
    RETURN_IF_ERROR(plan_.Read());
    return inner_->FindCalibration(tenant, id);
  }
  absl::StatusOr<std::optional<CalibrationRecord>> FindCalibrationOfRequest(
      const std::string& tenant, const std::string& request_id) override {
    return inner_->FindCalibrationOfRequest(tenant, request_id);
  }
  absl::StatusOr<std::vector<CalibrationRecord>> Calibrations(const CalibrationFilter& filter,
                                                              const std::optional<PageKey>& after,
                                                              int64_t count) override {
    return inner_->Calibrations(filter, after, count);
  }
  absl::StatusOr<std::vector<CalibrationRecord>> ExpiredCalibrations(
      base::UnixMicros now) override {
    return inner_->ExpiredCalibrations(now);
  }
  absl::StatusOr<CalibrationRecord> CommitSums(const std::string& id,
                                               const SumsCommit& commit) override {
    RETURN_IF_ERROR(plan_.Write(StoreWrite::kCommitSums));
    return inner_->CommitSums(id, commit);
  }
  absl::StatusOr<CalibrationRecord> RemoveCalibration(const std::string& tenant,
                                                      const std::string& id) override {
    RETURN_IF_ERROR(plan_.Write(StoreWrite::kRemoveCalibration));
    return inner_->RemoveCalibration(tenant, id);
  }
  absl::StatusOr<int64_t> UnfinishedJobs(const std::string& calibration_id) override {
    return inner_->UnfinishedJobs(calibration_id);
  }

  absl::StatusOr<JobChange> AddJob(const JobRecord& record) override {
    RETURN_IF_ERROR(plan_.Write(StoreWrite::kAddJob));
    return Told(StoreWrite::kAddJob, inner_->AddJob(record));
  }
  absl::StatusOr<JobRecord> FindJob(const std::string& tenant, const std::string& id) override {
    RETURN_IF_ERROR(plan_.Read());
    return inner_->FindJob(tenant, id);
  }
  absl::StatusOr<std::optional<JobRecord>> FindJobOfRequest(
      const std::string& tenant, const std::string& request_id) override {
    return inner_->FindJobOfRequest(tenant, request_id);
  }
  absl::StatusOr<std::vector<JobRecord>> Jobs(const JobFilter& filter,
                                              const std::optional<PageKey>& after,
                                              int64_t count) override {
    return inner_->Jobs(filter, after, count);
  }
  absl::StatusOr<int64_t> Ahead(const JobRecord& job) override { return inner_->Ahead(job); }
  absl::StatusOr<std::vector<JobRecord>> OverdueJobs(base::UnixMicros now) override {
    return inner_->OverdueJobs(now);
  }
  absl::StatusOr<std::vector<JobRecord>> ExpiredJobs(base::UnixMicros now) override {
    return inner_->ExpiredJobs(now);
  }
  absl::StatusOr<std::optional<JobRecord>> ClaimJob(const std::string& replica,
                                                    const std::string& claim,
                                                    const std::set<std::string>& without) override {
    RETURN_IF_ERROR(plan_.Write(StoreWrite::kClaimJob));
    ASSIGN_OR_RETURN(std::optional<JobRecord> claimed, inner_->ClaimJob(replica, claim, without));
    if (plan_.lost_claims > 0) {
      --plan_.lost_claims;
      return PlannedFailure(plan_.code);
    }
    if (claimed.has_value()) plan_.Written(StoreWrite::kClaimJob, *claimed);
    return claimed;
  }
  absl::StatusOr<JobChange> StartJob(const std::string& id, const std::string& claim,
                                     base::UnixMicros now) override {
    RETURN_IF_ERROR(plan_.Write(StoreWrite::kStartJob));
    return Told(StoreWrite::kStartJob, inner_->StartJob(id, claim, now));
  }
  absl::StatusOr<JobChange> ReleaseJob(const std::string& id, const std::string& claim) override {
    RETURN_IF_ERROR(plan_.Write(StoreWrite::kReleaseJob));
    return Told(StoreWrite::kReleaseJob, inner_->ReleaseJob(id, claim));
  }
  absl::StatusOr<JobChange> FinishJob(const std::string& id, const std::string& claim,
                                      const JobOutcome& outcome) override {
    RETURN_IF_ERROR(plan_.Write(StoreWrite::kFinishJob));
    return Told(StoreWrite::kFinishJob, inner_->FinishJob(id, claim, outcome));
  }
  absl::StatusOr<JobChange> CancelJob(const std::string& tenant, const std::string& id,
                                      const absl::Status& reason, base::UnixMicros now) override {
    RETURN_IF_ERROR(plan_.Write(StoreWrite::kCancelJob));
    return Told(StoreWrite::kCancelJob, inner_->CancelJob(tenant, id, reason, now));
  }
  absl::StatusOr<JobRecord> RemoveJob(const std::string& tenant, const std::string& id) override {
    RETURN_IF_ERROR(plan_.Write(StoreWrite::kRemoveJob));
    return inner_->RemoveJob(tenant, id);
  }

 private:
  absl::StatusOr<JobChange> Told(StoreWrite write, absl::StatusOr<JobChange> change) const {
    if (change.ok()) plan_.Written(write, change->job);
    return change;
  }

  const std::shared_ptr<Catalog> inner_;
  const bool stays_;
  StorePlan& plan_;
};

}  // namespace

absl::Status StorePlan::Write(StoreWrite write) {
  if (before) before(write);
  const int64_t number = writes++;
  const int64_t first = fail_at;
  if (first < 0 || number < first || number - first >= fail_count) return absl::OkStatus();
  return PlannedFailure(code);
}

absl::Status StorePlan::Read() {
  if (failing_reads <= 0) return absl::OkStatus();
  --failing_reads;
  return PlannedFailure(code);
}

std::string NameOf(StoreKind kind) {
  if (kind == StoreKind::kMemory) return "Memory";
  return kind == StoreKind::kKept ? "Kept" : "Sqlite";
}

Server::Server(StoreKind kind) : kind_(kind) {
  options.workers = 2;
  options.memory_bytes = int64_t{256} << 20;
  options.cache_bytes = int64_t{16} << 20;
  options.commit_interval = std::chrono::hours(1);
  options.tick_interval = std::chrono::hours(1);
}

void Server::Start() {
  Storage storage;
  std::shared_ptr<Catalog> catalog = kept_catalog_;
  std::shared_ptr<Blobs> blobs = kept_blobs_;
  if (catalog == nullptr) {
    auto opened = OpenStorage(kind_ == StoreKind::kSqlite ? directory_.data() : "");
    ASSERT_TRUE(opened.ok()) << opened.status();
    storage.lock = std::move(opened->lock);
    catalog = std::move(opened->catalog);
    blobs = std::move(opened->blobs);
  }
  if (kind_ == StoreKind::kKept) {
    kept_catalog_ = catalog;
    kept_blobs_ = blobs;
  }
  storage.catalog =
      std::make_unique<WatchedCatalog>(std::move(catalog), kind_ != StoreKind::kMemory, plan);
  storage.blobs = std::make_unique<WatchedBlobs>(std::move(blobs), plan);
  auto started = Backend::Start(options, std::move(storage));
  ASSERT_TRUE(started.ok()) << started.status();
  backend_ = *std::move(started);
}

void Settle(Backend& backend) {
  EXPECT_TRUE(backend.pool().WaitRunning(std::chrono::steady_clock::now() + kPatience));
}

CalibrationRequest Wanted::request() const {
  CalibrationRequest made;
  made.request_id = request_id;
  made.digest = digest;
  made.features = features;
  made.held_out_fraction = held_out_fraction;
  made.sequence_rows = sequence_rows;
  made.labels = labels;
  made.ttl_micros = ttl_micros;
  return made;
}

absl::Status InStrand(const std::shared_ptr<PartialSums>& sums,
                      const std::function<absl::Status()>& work) {
  if (sums == nullptr) return work();
  const auto over = std::make_shared<Gate>();
  const auto result = std::make_shared<absl::Status>();
  RETURN_IF_ERROR(sums->strand().Post({.run = work, .done = [over, result](absl::Status status) {
                                         *result = std::move(status);
                                         over->Open();
                                       }}));
  if (!over->Wait()) return absl::InternalError("the strand stands still");
  // Moved: references counted inside the prebuilt library are not seen by ThreadSanitizer.
  return std::move(*result);
}

CalibrationView CalibrationCalls::View() const {
  auto view = desk().Get(tenant_, id_);
  EXPECT_TRUE(view.ok()) << view.status();
  return std::move(view).value_or(CalibrationView());
}

absl::StatusOr<std::shared_ptr<PartialSums>> CalibrationCalls::Partial() const {
  return desk().Partial(tenant_, id_);
}

absl::Status CalibrationCalls::Commit() const {
  ASSIGN_OR_RETURN(const std::shared_ptr<PartialSums> sums, Partial());
  if (sums == nullptr) return absl::OkStatus();
  return InStrand(sums, [&] { return sums->Commit(); });
}

absl::StatusOr<bool> CalibrationCalls::Import(const std::string& stream_id, bool held_out,
                                              const engine::Statistics& sums) const {
  ASSIGN_OR_RETURN(const std::shared_ptr<PartialSums> partial, Partial());
  bool known = false;
  RETURN_IF_ERROR(InStrand(partial, [&]() -> absl::Status {
    ASSIGN_OR_RETURN(known, desk().Import(tenant_, id_, partial, stream_id, held_out, sums));
    return absl::OkStatus();
  }));
  return known;
}

absl::StatusOr<SumsSnapshot> CalibrationCalls::Export(bool held_out) const {
  ASSIGN_OR_RETURN(const std::shared_ptr<PartialSums> partial, Partial());
  SumsSnapshot snapshot;
  RETURN_IF_ERROR(InStrand(partial, [&]() -> absl::Status {
    ASSIGN_OR_RETURN(snapshot, desk().Export(tenant_, id_, partial, held_out));
    return absl::OkStatus();
  }));
  return snapshot;
}

absl::Status CalibrationCalls::Finalize(std::optional<int64_t> tokens,
                                        std::vector<std::string> stream_ids) const {
  ASSIGN_OR_RETURN(const std::shared_ptr<PartialSums> partial, Partial());
  const FinalizeExpectations expected{.tokens = tokens, .stream_ids = std::move(stream_ids)};
  return InStrand(partial, [&] { return desk().Finalize(tenant_, id_, partial, expected); });
}

absl::Status CalibrationCalls::Remove() const {
  ASSIGN_OR_RETURN(const std::shared_ptr<PartialSums> partial, Partial());
  return InStrand(partial, [&] { return desk().Remove(tenant_, id_, partial); });
}

absl::StatusOr<CalibrationDesk::Pin> CalibrationCalls::Pin() const {
  return desk().PinFinalized(tenant_, id_);
}

absl::StatusOr<SplitSums> CalibrationCalls::Sums() const {
  ASSIGN_OR_RETURN(const CalibrationRecord record, desk().Find(tenant_, id_));
  return desk().Sums(record);
}

StreamCall::StreamCall(const CalibrationCalls& calibration, const std::string& stream_id,
                       std::function<void()> changed)
    : live_(std::make_shared<LiveStream>(
          stream_id, engine::DType::kF32, engine::DType::kF32,
          changed ? std::move(changed) : [] {})) {
  absl::StatusOr<std::shared_ptr<PartialSums>> sums = calibration.Partial();
  if (!sums.ok()) {
    opened_ = sums.status();
    return;
  }
  sums_ = *std::move(sums);
  opened_ =
      sums_ == nullptr ? FinalizedError() : InStrand(sums_, [this] { return sums_->Open(live_); });
}

absl::Status StreamCall::Fold(int64_t sequence, std::span<const std::byte> x,
                              std::span<const std::byte> x_quantized) {
  return InStrand(sums_, [&] { return sums_->Fold(*live_, sequence, x, x_quantized); });
}

absl::Status StreamCall::PostFold(int64_t sequence, std::span<const std::byte> x,
                                  std::function<void(const absl::Status&)> done) {
  return sums_->strand().Post(
      {.run = [sums = sums_, live = live_, sequence,
               x] { return sums->Fold(*live, sequence, x, {}); },
       .done = [done = std::move(done)](const absl::Status& status) { done(status); }});
}

void StreamCall::Close() {
  if (sums_ != nullptr) sums_->Close(*live_);
}

absl::Status SendRows(const CalibrationCalls& calibration, const std::string& stream_id,
                      const Layer& layer, int64_t chunk_rows) {
  StreamCall stream(calibration, stream_id);
  RETURN_IF_ERROR(stream.opened());
  int64_t sequence = 0;
  for (int64_t row = 0; row < layer.tokens; row += chunk_rows) {
    RETURN_IF_ERROR(stream.Fold(sequence, RowBytes(layer.x, layer.features, row,
                                                   std::min(layer.tokens, row + chunk_rows))));
    ++sequence;
  }
  return absl::OkStatus();
}

std::vector<double> GramOf(const Layer& layer, const std::function<bool(int64_t)>& take) {
  const int64_t n = layer.features;
  std::vector<double> gram(static_cast<size_t>(n * n));
  for (int64_t row = 0; row < layer.tokens; ++row) {
    if (take && !take(row)) continue;
    const float* x = layer.x.data() + row * n;
    for (int64_t i = 0; i < n; ++i) {
      for (int64_t j = 0; j < n; ++j) {
        gram[static_cast<size_t>(i * n + j)] += static_cast<double>(x[i]) * x[j];
      }
    }
  }
  return gram;
}

double Difference(const engine::Statistics& sums, const std::vector<double>& gram) {
  const int64_t n = sums.features();
  const auto at = [&](int64_t i, int64_t j) { return gram[static_cast<size_t>(i * n + j)]; };
  double worst = 0;
  for (int64_t i = 0; i < n; ++i) {
    for (int64_t j = i; j < n; ++j) {
      const double size = std::sqrt(at(i, i) * at(j, j));
      const double difference = std::abs(sums.gram.at(i, j) - at(i, j));
      worst = std::max(worst, size > 0 ? difference / size : difference);
    }
  }
  return worst;
}

std::string Calibrate(Server& server, const Layer& layer, Wanted wanted,
                      const std::string& tenant) {
  wanted.features = layer.features;
  const auto made = server->calibrations().Create({tenant, {}}, wanted.request());
  EXPECT_TRUE(made.ok()) << made.status();
  if (!made.ok()) return "";
  const CalibrationCalls calibration(server, made->record.id(), tenant);
  absl::Status status = SendRows(calibration, "stream", layer, 100);
  if (status.ok()) status = calibration.Finalize();
  EXPECT_TRUE(status.ok()) << status;
  return status.ok() ? calibration.id() : "";
}

v1::QuantizationSpec SpecOf(v1::Method method) {
  v1::QuantizationSpec spec;
  spec.set_method(method);
  spec.set_bits(4);
  return spec;
}

JobRequest JobRequestFor(const Layer& layer, const std::string& calibration_id,
                         const std::string& request_id, v1::Method method) {
  v1::CreateJobHeader header;
  header.set_request_id(request_id);
  header.set_layer_name("model.layers.0.test");
  header.set_calibration_id(calibration_id);
  *header.mutable_spec() = SpecOf(method);
  header.mutable_weight()->set_name("weight");
  header.mutable_weight()->set_dtype(v1::DATA_TYPE_F32);
  header.mutable_weight()->add_shape(layer.rows);
  header.mutable_weight()->add_shape(layer.features);
  auto request = ReadJobRequest(header);
  EXPECT_TRUE(request.ok()) << request.status();
  return *std::move(request);
}

absl::StatusOr<JobView> Submit(Backend& backend, const Layer& layer, const JobRequest& request,
                               const Tenant& tenant) {
  const engine::Cancellation cancellation;
  ASSIGN_OR_RETURN(const std::unique_ptr<Upload> upload,
                   backend.jobs().Begin(tenant, request, cancellation));
  const int64_t half = layer.rows / 2;
  for (const auto& [begin, end] : {std::pair(int64_t{0}, half), std::pair(half, layer.rows)}) {
    if (begin == end) continue;
    RETURN_IF_ERROR(
        upload->AppendWeights(begin, RowBytes(layer.weights, layer.features, begin, end)));
  }
  RETURN_IF_ERROR(upload->Finish());
  return backend.jobs().Add(tenant, *upload);
}

JobView ViewOf(Backend& backend, const std::string& id) {
  auto view = backend.jobs().Get({}, id);
  EXPECT_TRUE(view.ok()) << view.status();
  return std::move(view).value_or(JobView());
}

JobView WaitFor(Backend& backend, const std::string& id,
                const std::function<bool(const JobView&)>& wanted) {
  std::mutex mu;
  std::condition_variable changed;
  const auto listener = std::make_shared<base::Listener>([&] {
    const std::lock_guard lock(mu);
    changed.notify_all();
  });
  backend.jobs().events().Watch(id, listener);
  const auto deadline = std::chrono::steady_clock::now() + kPatience;
  JobView view = ViewOf(backend, id);
  {
    std::unique_lock lock(mu);
    // What changed between the look and the wait would go unheard: it looks again soon.
    while (!wanted(view) && std::chrono::steady_clock::now() < deadline) {
      changed.wait_for(lock, std::chrono::milliseconds(20));
      lock.unlock();
      view = ViewOf(backend, id);
      lock.lock();
    }
  }
  listener->Detach();
  backend.jobs().events().Unwatch(id, listener);
  return view;
}

void RunTasks(Backend& backend) {
  // The first may be behind a task that posts another.
  for (int i = 0; i < 2; ++i) {
    const auto ran = std::make_shared<certiq::testing::Gate>();
    ASSERT_TRUE(backend.pool()
                    .Post({.run =
                               [ran] {
                                 ran->Open();
                                 return absl::OkStatus();
                               },
                           .done = [](const absl::Status&) {}})
                    .ok());
    ASSERT_TRUE(ran->Wait());
  }
}

JobState WaitForEnd(Backend& backend, const std::string& id) {
  return WaitFor(backend, id, [](const JobView& view) { return IsFinal(view.record.state()); })
      .record.state();
}

absl::StatusOr<JobResult> ReadAll(ResultReader& reader) {
  JobResult result;
  while (reader.at_tensors()) {
    std::string piece;
    RETURN_IF_ERROR(reader.ReadBytes(
        std::min<int64_t>(reader.record().tensor_bytes() - reader.offset(), 1000), piece));
    result.tensors += piece;
  }
  while (!reader.at_end()) {
    v1::Certificate part;
    RETURN_IF_ERROR(reader.ReadCertificate(part));
    result.certificate.MergeFrom(part);
  }
  return result;
}

absl::StatusOr<JobResult> ResultOf(Backend& backend, const std::string& id) {
  ASSIGN_OR_RETURN(const std::unique_ptr<ResultReader> reader,
                   backend.jobs().OpenResult({}, id, 0));
  return ReadAll(*reader);
}

}  // namespace certiq::server::testing
