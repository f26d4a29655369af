// Backends in tests: storage that fails or stays, calibrations and jobs as calls make them.

#ifndef CERTIQ_TESTS_SUPPORT_BACKEND_EXAMPLES_H_
#define CERTIQ_TESTS_SUPPORT_BACKEND_EXAMPLES_H_

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "backend.h"
#include "certiq/v1/certificate.pb.h"
#include "certiq/v1/spec.pb.h"
#include "store/store_examples.h"
#include "support/layers.h"

namespace certiq::server::testing {

// The writes of a watched storage, in the order of catalog.h and blobs.h.
enum class StoreWrite {
  kAddCalibration,
  kCommitSums,
  kRemoveCalibration,
  kAddJob,
  kClaimJob,
  kStartJob,
  kReleaseJob,
  kFinishJob,
  kCancelJob,
  kRemoveJob,
  kCreateBlob,
  kCommitBlob,
};

// What a watched storage is to do. Thread-safe, but for the functions: they are set while nothing
// runs.
struct StorePlan {
  std::atomic<int64_t> writes{0};
  // The write of this number fails, and so many after it.
  std::atomic<int64_t> fail_at{-1};
  std::atomic<int64_t> fail_count{1};
  std::atomic<int> code{static_cast<int>(absl::StatusCode::kUnavailable)};
  // So many of the next reads of single records fail.
  std::atomic<int64_t> failing_reads{0};
  // There is no room for another blob.
  std::atomic<bool> no_room{false};
  // So many of the next claims are written and fail nevertheless, as if the answer were lost.
  std::atomic<int64_t> lost_claims{0};
  // Before a write, and before the plan fails it.
  std::function<void(StoreWrite)> before;
  // After an event of a job that was written; a claim that found no job is none.
  std::function<void(StoreWrite, const JobRecord&)> after;

  void FailFrom(int64_t count) {
    fail_count = count;
    fail_at = writes.load();
  }
  void Heal() { fail_at = -1; }
  absl::Status Write(StoreWrite write);
  absl::Status Read();
  void Written(StoreWrite write, const JobRecord& job) const {
    if (after) after(write, job);
  }
};

enum class StoreKind {
  // Goes with the process, and says so.
  kMemory,
  // Memory that outlives the backend, as if it were a disk.
  kKept,
  kSqlite,
};
std::string NameOf(StoreKind kind);

// A backend and what outlives it. It looks after what is due only when told or woken.
class Server {
 public:
  explicit Server(StoreKind kind);
  ~Server() { Stop(); }

  void Start();
  void Stop() { backend_.reset(); }
  void Restart() {
    Stop();
    Start();
  }
  Backend* operator->() { return backend_.get(); }
  Backend& operator*() { return *backend_; }

  // Used from the next Start on.
  Backend::Options options;
  StorePlan plan;

 private:
  const StoreKind kind_;
  TemporaryDirectory directory_;
  std::shared_ptr<Catalog> kept_catalog_;
  std::shared_ptr<Blobs> kept_blobs_;
  std::unique_ptr<Backend> backend_;
};

// Waits until no task or job runs.
void Settle(Backend& backend);

// A CalibrationRequest of which a test names what matters.
struct Wanted {
  std::string request_id = {};
  std::string digest = {};
  int64_t features = 0;
  double held_out_fraction = 0;
  int32_t sequence_rows = 0;
  std::vector<std::string> labels = {};
  int64_t ttl_micros = kDefaultTtlMicros;

  CalibrationRequest request() const;
};

// Runs a piece of work in the strand of `sums` and waits for it; here where there are none.
absl::Status InStrand(const std::shared_ptr<PartialSums>& sums,
                      const std::function<absl::Status()>& work);

// One calibration of the server's, each method a call of a client's.
class CalibrationCalls {
 public:
  // The server outlives it; it may restart in between.
  CalibrationCalls(Server& server, std::string id, std::string tenant = "")
      : server_(server), id_(std::move(id)), tenant_{std::move(tenant), {}} {}

  const std::string& id() const { return id_; }
  // A failure is reported.
  CalibrationView View() const;
  absl::StatusOr<std::shared_ptr<PartialSums>> Partial() const;
  // Makes durable what was received; OK where it is finalized.
  absl::Status Commit() const;
  absl::StatusOr<bool> Import(const std::string& stream_id, bool held_out,
                              const engine::Statistics& sums) const;
  absl::StatusOr<SumsSnapshot> Export(bool held_out) const;
  absl::Status Finalize(std::optional<int64_t> tokens = std::nullopt,
                        std::vector<std::string> stream_ids = {}) const;
  absl::Status Remove() const;
  absl::StatusOr<CalibrationDesk::Pin> Pin() const;
  // The finalized sums.
  absl::StatusOr<SplitSums> Sums() const;

 private:
  CalibrationDesk& desk() const { return server_->calibrations(); }

  Server& server_;
  std::string id_;
  Tenant tenant_;
};

// An Accumulate call: a stream that is open until this is destroyed.
class StreamCall {
 public:
  StreamCall(const CalibrationCalls& calibration, const std::string& stream_id,
             std::function<void()> changed = {});
  ~StreamCall() { Close(); }
  StreamCall(const StreamCall&) = delete;
  StreamCall& operator=(const StreamCall&) = delete;

  const absl::Status& opened() const { return opened_; }
  absl::Status Fold(int64_t sequence, std::span<const std::byte> x,
                    std::span<const std::byte> x_quantized = {});
  // The same without waiting; `done` hears how it went.
  absl::Status PostFold(int64_t sequence, std::span<const std::byte> x,
                        std::function<void(const absl::Status&)> done);
  std::pair<StreamView, absl::Status> Look() const { return sums_->Look(*live_); }
  // Tells of nothing any more.
  void Detach() { live_->changed.Detach(); }
  void Close();

 private:
  std::shared_ptr<PartialSums> sums_;
  std::shared_ptr<LiveStream> live_;
  absl::Status opened_;
};

// Opens the stream, sends the rows in chunks of so many, closes it.
absl::Status SendRows(const CalibrationCalls& calibration, const std::string& stream_id,
                      const certiq::testing::Layer& layer, int64_t chunk_rows);

// The sums of the rows of x that `take` names, in float64: row-major [features, features].
std::vector<double> GramOf(const certiq::testing::Layer& layer,
                           const std::function<bool(int64_t)>& take = {});
// The largest difference as a share of sqrt(H_ii H_jj).
double Difference(const engine::Statistics& sums, const std::vector<double>& gram);

// The id of a finalized calibration of the layer's activations; empty after a failure, which is
// reported.
std::string Calibrate(Server& server, const certiq::testing::Layer& layer, Wanted wanted = {},
                      const std::string& tenant = "");

// 4 bits; QRONOS without damping of its own.
v1::QuantizationSpec SpecOf(v1::Method method);

// CreateJob's request, as its header says it.
JobRequest JobRequestFor(const certiq::testing::Layer& layer, const std::string& calibration_id,
                         const std::string& request_id = "",
                         v1::Method method = v1::METHOD_NEAREST);
// Begin, AppendWeights in two pieces, Finish, Add.
absl::StatusOr<JobView> Submit(Backend& backend, const certiq::testing::Layer& layer,
                               const JobRequest& request, const Tenant& tenant = {});
// A failure is reported.
JobView ViewOf(Backend& backend, const std::string& id);
// Waits until the view is as wanted; what it is after a long time if not.
JobView WaitFor(Backend& backend, const std::string& id,
                const std::function<bool(const JobView&)>& wanted);
JobState WaitForEnd(Backend& backend, const std::string& id);
// Waits for the tasks that were posted, claims among them, while a job keeps the only worker.
void RunTasks(Backend& backend);

struct JobResult {
  // The bytes of all tensors.
  std::string tensors;
  v1::Certificate certificate;
};
absl::StatusOr<JobResult> ReadAll(ResultReader& reader);
absl::StatusOr<JobResult> ResultOf(Backend& backend, const std::string& id);

}  // namespace certiq::server::testing

#endif  // CERTIQ_TESTS_SUPPORT_BACKEND_EXAMPLES_H_
