#include "support/backend_examples.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <chrono>
#include <cmath>
#include <condition_variable>
#include <mutex>
#include <utility>

#include "absl/strings/str_cat.h"
#include "store/memory_store.h"
#include "store/sqlite_store.h"
#include "support/gate.h"

namespace certiq::server::testing {
namespace {

using certiq::testing::Gate;
using certiq::testing::kPatience;
using certiq::testing::Layer;
using certiq::testing::RowBytes;

class WatchedWriter final : public BlobWriter {
 public:
  WatchedWriter(std::unique_ptr<BlobWriter> inner, StorePlan& plan)
      : inner_(std::move(inner)), plan_(plan) {}

  absl::Status Append(std::span<const std::byte> bytes) override { return inner_->Append(bytes); }
  absl::StatusOr<BlobRef> Commit() override {
    if (absl::Status write = plan_.Write(); !write.ok()) return write;
    return inner_->Commit();
  }

 private:
  const std::unique_ptr<BlobWriter> inner_;
  StorePlan& plan_;
};

// Passes on to another, unless the plan has it fail.
class WatchedStore final : public Store {
 public:
  WatchedStore(std::shared_ptr<Store> inner, bool stays, StorePlan& plan)
      : inner_(std::move(inner)), stays_(stays), plan_(plan) {}

  bool durable() const override { return stays_; }
  absl::StatusOr<StoredState> Load() override { return inner_->Load(); }
  absl::StatusOr<std::unique_ptr<BlobWriter>> CreateBlob() override {
    if (absl::Status write = plan_.Write(); !write.ok()) return write;
    auto writer = inner_->CreateBlob();
    if (!writer.ok()) return writer.status();
    return std::make_unique<WatchedWriter>(*std::move(writer), plan_);
  }
  absl::StatusOr<std::unique_ptr<BlobReader>> OpenBlob(const BlobRef& blob) override {
    return inner_->OpenBlob(blob);
  }
  void DeleteBlob(const BlobRef& blob) override { inner_->DeleteBlob(blob); }
  absl::Status PutCalibration(const CalibrationRecord& record) override {
    absl::Status write = plan_.Write();
    return write.ok() ? inner_->PutCalibration(record) : write;
  }
  absl::Status PutJob(const JobRecord& record) override {
    if (plan_.before_put) plan_.before_put(record);
    absl::Status write = plan_.Write();
    return write.ok() ? inner_->PutJob(record) : write;
  }
  absl::Status DeleteCalibration(const std::string& id) override {
    absl::Status write = plan_.Write();
    return write.ok() ? inner_->DeleteCalibration(id) : write;
  }
  absl::Status DeleteJob(const std::string& id) override {
    absl::Status write = plan_.Write();
    return write.ok() ? inner_->DeleteJob(id) : write;
  }

 private:
  const std::shared_ptr<Store> inner_;
  const bool stays_;
  StorePlan& plan_;
};

}  // namespace

absl::Status StorePlan::Write() {
  const int64_t number = writes++;
  const int64_t first = fail_at;
  if (first < 0 || number < first || number - first >= fail_count) return absl::OkStatus();
  return absl::Status(static_cast<absl::StatusCode>(code.load()), "the disk fails as planned");
}

std::string NameOf(StoreKind kind) {
  if (kind == StoreKind::kMemory) return "Memory";
  return kind == StoreKind::kKept ? "Kept" : "Sqlite";
}

absl::StatusOr<engine::ResolvedSpec> TestCodec::DecodeSpec(const std::string& spec) const {
  engine::QuantizationSpec wanted;
  wanted.bits = 4;
  if (spec == "nearest") {
    wanted.method = engine::Method::kNearest;
  } else if (spec == "optq") {
    wanted.method = engine::Method::kOptq;
  } else if (spec == "qronos") {
    wanted.method = engine::Method::kQronos;
  } else {
    return absl::InvalidArgumentError(absl::StrCat("no spec: ", spec));
  }
  return engine::ResolveSpec(wanted);
}

std::string TestCodec::EncodeError(const absl::Status& error) const { return error.ToString(); }

std::string TestCodec::EncodeHeader(const std::vector<engine::ResultTensor>& tensors) const {
  std::string header;
  for (const engine::ResultTensor& tensor : tensors) {
    absl::StrAppend(&header, tensor.role, ":", tensor.bytes.size(), " ");
  }
  return header;
}

std::vector<std::string> TestCodec::EncodeCertificate(const engine::LayerCertificate& certificate,
                                                      const CallFacts& facts) const {
  return {absl::StrCat(certificate.relative_error, " ", certificate.lambda_used),
          absl::StrCat(facts.weights_sha256, " ", facts.sums_sha256)};
}

Server::Server(StoreKind kind) : kind_(kind) {
  options.workers = 2;
  options.memory_bytes = int64_t{256} << 20;
  options.cache_bytes = int64_t{16} << 20;
  options.commit_interval = std::chrono::hours(1);
  options.tick_interval = std::chrono::hours(1);
}

void Server::Start() {
  std::shared_ptr<Store> store = kept_;
  if (kind_ == StoreKind::kSqlite) {
    auto opened = OpenSqliteStore(directory_.data());
    ASSERT_TRUE(opened.ok()) << opened.status();
    store = *std::move(opened);
  } else if (store == nullptr) {
    store = NewMemoryStore();
    if (kind_ == StoreKind::kKept) kept_ = store;
  }
  auto watched =
      std::make_unique<WatchedStore>(std::move(store), kind_ != StoreKind::kMemory, plan);
  auto started = Backend::Start(options, std::move(watched), std::make_unique<TestCodec>());
  ASSERT_TRUE(started.ok()) << started.status();
  backend_ = *std::move(started);
}

absl::Status InStrand(Calibration& calibration, std::function<absl::Status()> work) {
  const auto over = std::make_shared<Gate>();
  const auto result = std::make_shared<absl::Status>();
  absl::Status posted = calibration.strand().Post(
      {.run = std::move(work), .done = [over, result](absl::Status status) {
         *result = std::move(status);
         over->Open();
       }});
  if (!posted.ok()) return posted;
  if (!over->Wait()) return absl::InternalError("the strand stands still");
  // Moved: references counted inside the prebuilt library are not seen by ThreadSanitizer.
  return std::move(*result);
}

std::shared_ptr<LiveStream> NewStream(const std::string& id, std::function<void()> changed) {
  return std::make_shared<LiveStream>(
      id, engine::DType::kF32, engine::DType::kF32, changed ? std::move(changed) : [] {});
}

absl::Status SendRows(Calibration& calibration, const std::string& stream_id, const Layer& layer,
                      int64_t chunk_rows) {
  const auto live = NewStream(stream_id);
  absl::Status sent = InStrand(calibration, [&] { return calibration.Open(live); });
  int64_t sequence = 0;
  for (int64_t row = 0; sent.ok() && row < layer.tokens; row += chunk_rows) {
    const auto bytes =
        RowBytes(layer.x, layer.features, row, std::min(layer.tokens, row + chunk_rows));
    sent = InStrand(calibration, [&] { return calibration.Fold(*live, sequence, bytes, {}); });
    ++sequence;
  }
  calibration.Close(*live);
  return sent;
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

std::shared_ptr<Calibration> Calibrate(Backend& backend, const Layer& layer,
                                       const std::string& tenant) {
  const auto calibration =
      backend.calibrations().Create({tenant, {}}, Wanted{.features = layer.features}.request());
  EXPECT_TRUE(calibration.ok()) << calibration.status();
  if (!calibration.ok()) return nullptr;
  absl::Status status = SendRows(**calibration, "stream", layer, 100);
  if (status.ok()) {
    status = InStrand(**calibration, [&] { return (*calibration)->Finalize(std::nullopt, {}); });
  }
  EXPECT_TRUE(status.ok()) << status;
  return *calibration;
}

JobRequest JobRequestFor(const Layer& layer, const Calibration& calibration,
                         const std::string& request_id, const std::string& spec) {
  JobRequest request;
  request.request_id = request_id;
  request.digest = "header of " + spec;
  request.layer_name = "model.layers.0.test";
  request.calibration_id = calibration.id();
  request.stored_spec = spec;
  request.spec = TestCodec().DecodeSpec(spec).value_or(engine::ResolvedSpec());
  request.rows = layer.rows;
  request.features = layer.features;
  return request;
}

absl::StatusOr<std::shared_ptr<StoredJob>> Submit(Backend& backend, const Layer& layer,
                                                  const JobRequest& request, const Tenant& tenant) {
  auto upload = backend.manager().Begin(tenant, request);
  if (!upload.ok()) return upload.status();
  const int64_t half = layer.rows / 2;
  for (const auto& [begin, end] : {std::pair(int64_t{0}, half), std::pair(half, layer.rows)}) {
    if (begin == end) continue;
    absl::Status sent =
        (*upload)->Append(begin, RowBytes(layer.weights, layer.features, begin, end));
    if (!sent.ok()) return sent;
  }
  return (*upload)->Finish();
}

JobView WaitFor(StoredJob& job, const std::function<bool(const JobView&)>& wanted) {
  std::mutex mu;
  std::condition_variable changed;
  const auto listener = std::make_shared<base::Listener>([&] {
    const std::lock_guard lock(mu);
    changed.notify_all();
  });
  job.Watch(listener);
  const auto deadline = std::chrono::steady_clock::now() + kPatience;
  JobView view = job.View();
  {
    std::unique_lock lock(mu);
    // What changed between the look and the wait would go unheard: it looks again soon.
    while (!wanted(view) && std::chrono::steady_clock::now() < deadline) {
      changed.wait_for(lock, std::chrono::milliseconds(20));
      lock.unlock();
      view = job.View();
      lock.lock();
    }
  }
  listener->Detach();
  job.Unwatch(listener);
  return view;
}

JobState WaitForEnd(StoredJob& job) {
  return WaitFor(job, [](const JobView& view) { return IsFinal(view.record.state); }).record.state;
}

void Settle(Backend& backend) {
  EXPECT_TRUE(backend.pool().WaitRunning(std::chrono::steady_clock::now() + kPatience));
}

absl::StatusOr<std::vector<std::byte>> ResultOf(Backend& backend, const StoredJob& job) {
  return ReadBlob(backend.environment().store, job.View().record.result);
}

}  // namespace certiq::server::testing
