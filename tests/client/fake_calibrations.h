// Fake CalibrationService, which keeps everything in memory and fails where a test says so.
#ifndef CERTIQ_TESTS_CLIENT_FAKE_CALIBRATIONS_H_
#define CERTIQ_TESTS_CLIENT_FAKE_CALIBRATIONS_H_

#include <cstdint>
#include <functional>
#include <map>
#include <mutex>
#include <optional>
#include <string>
#include <vector>

#include "certiq/v1/calibration_service.grpc.pb.h"
#include "grpcpp/support/status.h"

namespace certiq::testing {

// Chunks of one stream, in order; `durable` of them survive Crash().
struct FakeStream {
  std::vector<v1::AccumulateChunk> chunks;
  int64_t durable = 0;
  int64_t row_bytes = 1;

  void Crash() { chunks.resize(static_cast<size_t>(durable)); }
  v1::StreamProgress Progress(const std::string& id) const;
  // The rows of all chunks.
  std::string X() const;
  std::string XQuantized() const;
};

// Calibrations are "c1", "c2", …. Set the hooks before the first call; read the rest after the
// last one.
class FakeCalibrations final : public v1::CalibrationService::Service {
 public:
  using Chunks = grpc::ServerReaderWriter<v1::AccumulateResponse, v1::AccumulateRequest>;
  // What a hook may end a call with; nullopt goes on.
  using End = std::optional<grpc::Status>;

  // Before call number `call`, from 1, of Accumulate answers its header.
  std::function<End(int call, FakeStream* stream)> on_open;
  // After a chunk was taken in.
  std::function<End(int call, FakeStream* stream)> on_chunk;
  // Instead of the status of a unary call that worked; `calls` counts those of the method.
  std::function<End(const std::string& method, int calls)> on_unary;
  // Chunks after which everything is made durable; 0: only at the end of the call.
  int64_t durable_every = 1;

  // A client that cancelled is back before the call's handler is: waits for the latter.
  void Wait() { const std::lock_guard lock(mutex_); }

  // Adds one as if it had been created.
  v1::Calibration* Add(v1::CalibrationState state = v1::CALIBRATION_STATE_OPEN,
                       const std::vector<std::string>& labels = {}, int64_t features = 4);

  std::vector<v1::Calibration> calibrations;
  std::map<std::string, FakeStream> streams;
  // Sequence numbers as they came, duplicates too; one list a call.
  std::vector<std::vector<int64_t>> sent;
  std::vector<v1::AccumulateHeader> headers;
  std::map<std::string, int> calls;
  v1::FinalizeCalibrationRequest finalized;
  v1::StatisticsHeader imported;
  std::string imported_bytes;
  // What an export answers.
  std::vector<v1::ExportStatisticsResponse> exported;

  grpc::Status CreateCalibration(grpc::ServerContext*, const v1::CreateCalibrationRequest*,
                                 v1::Calibration*) override;
  grpc::Status Accumulate(grpc::ServerContext*, Chunks*) override;
  grpc::Status ImportStatistics(grpc::ServerContext*,
                                grpc::ServerReader<v1::ImportStatisticsRequest>*,
                                v1::ImportStatisticsResponse*) override;
  grpc::Status ExportStatistics(grpc::ServerContext*, const v1::ExportStatisticsRequest*,
                                grpc::ServerWriter<v1::ExportStatisticsResponse>*) override;
  grpc::Status FinalizeCalibration(grpc::ServerContext*, const v1::FinalizeCalibrationRequest*,
                                   v1::Calibration*) override;
  grpc::Status GetCalibration(grpc::ServerContext*, const v1::GetCalibrationRequest*,
                              v1::Calibration*) override;
  grpc::Status ListCalibrations(grpc::ServerContext*, const v1::ListCalibrationsRequest*,
                                v1::ListCalibrationsResponse*) override;
  grpc::Status DeleteCalibration(grpc::ServerContext*, const v1::DeleteCalibrationRequest*,
                                 google::protobuf::Empty*) override;

 private:
  grpc::Status Unary(const std::string& method);
  v1::Calibration* Find(const std::string& id);
  static grpc::Status NotFound(const std::string& id);

  std::mutex mutex_;
  std::map<std::string, std::string> request_ids_;
};

}  // namespace certiq::testing

#endif  // CERTIQ_TESTS_CLIENT_FAKE_CALIBRATIONS_H_
