// A server's backend in a test: stores that fail or stay, a codec, small calibrations and jobs.

#ifndef CERTIQ_TESTS_JOBS_BACKEND_EXAMPLES_H_
#define CERTIQ_TESTS_JOBS_BACKEND_EXAMPLES_H_

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "backend.h"
#include "store/store_examples.h"
#include "support/layers.h"

namespace certiq::server::testing {

// What a WatchedStore is to do. Thread-safe, but for `before_put`: set while nothing runs.
struct StorePlan {
  // Counts what may fail: records put and deleted, blobs created and committed.
  std::atomic<int64_t> writes{0};
  // The write of this number fails, and so many after it.
  std::atomic<int64_t> fail_at{-1};
  std::atomic<int64_t> fail_count{1};
  std::atomic<int> code{static_cast<int>(absl::StatusCode::kUnavailable)};
  std::function<void(const JobRecord&)> before_put;

  void FailFrom(int64_t count) {
    fail_count = count;
    fail_at = writes.load();
  }
  void Heal() { fail_at = -1; }
  absl::Status Write();
};

enum class StoreKind {
  // Goes with the process, and says so.
  kMemory,
  // Memory that outlives the backend, as if it were a disk.
  kKept,
  kSqlite,
};
std::string NameOf(StoreKind kind);

class TestCodec final : public Codec {
 public:
  // "nearest", "optq" or "qronos".
  absl::StatusOr<engine::ResolvedSpec> DecodeSpec(const std::string& spec) const override;
  std::string EncodeError(const absl::Status& error) const override;
  std::string EncodeHeader(const std::vector<engine::ResultTensor>& tensors) const override;
  // Nothing of it tells the time.
  std::vector<std::string> EncodeCertificate(const engine::LayerCertificate& certificate,
                                             const CallFacts& facts) const override;
};

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

  // Used from the next Start on.
  Backend::Options options;
  StorePlan plan;

 private:
  const StoreKind kind_;
  TemporaryDirectory directory_;
  std::shared_ptr<Store> kept_;
  std::unique_ptr<Backend> backend_;
};

// A CalibrationRequest of which a test names what matters.
struct Wanted {
  std::string request_id = {};
  std::string digest = {};
  int64_t features = 0;
  double held_out_fraction = 0;
  int32_t sequence_rows = 0;
  std::vector<std::string> labels = {};
  int64_t ttl_micros = kDefaultTtlMicros;

  CalibrationRequest request() const {
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
};

// Runs a piece of work in the calibration's strand and waits for it.
absl::Status InStrand(Calibration& calibration, std::function<absl::Status()> work);

std::shared_ptr<LiveStream> NewStream(const std::string& id, std::function<void()> changed = {});

// Opens the stream, sends the rows in chunks of so many, closes it.
absl::Status SendRows(Calibration& calibration, const std::string& stream_id,
                      const certiq::testing::Layer& layer, int64_t chunk_rows);

// The sums of the rows of x that `take` names, in float64: row-major [features, features].
std::vector<double> GramOf(const certiq::testing::Layer& layer,
                           const std::function<bool(int64_t)>& take = {});
// The largest difference as a share of sqrt(H_ii H_jj).
double Difference(const engine::Statistics& sums, const std::vector<double>& gram);

// Finalized, of the layer's activations; null after a failure, which is reported.
std::shared_ptr<Calibration> Calibrate(Backend& backend, const certiq::testing::Layer& layer,
                                       const std::string& tenant = "");

JobRequest JobRequestFor(const certiq::testing::Layer& layer, const Calibration& calibration,
                         const std::string& request_id = "", const std::string& spec = "nearest");
// Begin, Append, Finish.
absl::StatusOr<std::shared_ptr<StoredJob>> Submit(Backend& backend,
                                                  const certiq::testing::Layer& layer,
                                                  const JobRequest& request,
                                                  const Tenant& tenant = {});
// Waits until the view is as wanted; what it is after a long time if not.
JobView WaitFor(StoredJob& job, const std::function<bool(const JobView&)>& wanted);
JobState WaitForEnd(StoredJob& job);
// Waits until nothing runs.
void Settle(Backend& backend);
// The bytes of its result.
absl::StatusOr<std::vector<std::byte>> ResultOf(Backend& backend, const StoredJob& job);

}  // namespace certiq::server::testing

#endif  // CERTIQ_TESTS_JOBS_BACKEND_EXAMPLES_H_
