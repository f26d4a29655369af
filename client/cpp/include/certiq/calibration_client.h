// Client of the CalibrationService: sums of one input space, filled by many streams.
//
//   auto client = certiq::CalibrationClient::Create({.address = "localhost:8470"});
//   v1::CreateCalibrationRequest request;
//   request.set_features(576);
//   auto calibration = (*client)->CreateCalibration(request);
//   auto stream = (*client)->OpenStream({.calibration_id = calibration->id(), .stream_id = "0",
//                                        .features = 576, .x = v1::DATA_TYPE_F32});
//   (*stream)->Write(x);  // [m, 576], as often as there are rows
//   (*stream)->Close();
//   (*client)->Finalize({calibration->id()});
#ifndef CERTIQ_CLIENT_CPP_INCLUDE_CERTIQ_CALIBRATION_CLIENT_H_
#define CERTIQ_CLIENT_CPP_INCLUDE_CERTIQ_CALIBRATION_CLIENT_H_

#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "certiq/activation_stream.h"
#include "certiq/client.h"
#include "certiq/statistics.h"
#include "certiq/tensor.h"
#include "certiq/v1/calibration_service.pb.h"

namespace certiq {

struct CalibrationFilter {
  // Empty: all.
  std::string label = {};
  // Calibrations in a message; 0: the server's default. The list is complete either way.
  int32_t page_size = 0;
};

struct FinalizeRequest {
  std::string calibration_id = {};
  // Tokens and streams there must be.
  std::optional<int64_t> expected_tokens = std::nullopt;
  std::vector<std::string> expected_stream_ids = {};
};

// Every call blocks. Errors of all of them: the server's status as calibration_service.proto lists
// them, details readable by DetailsOf(status), UNAVAILABLE where no server could be reached; both
// come back only after the tries that ClientOptions::retry allows. INTERNAL where the server's
// answer breaks the contract; CANCELLED, DEADLINE_EXCEEDED by the options.
// Thread-safe: any number of calls may run at once on one client, which must outlive them, but
// not their ActivationStreams.
class CalibrationClient {
 public:
  // Does not connect yet. Errors as Client::Create.
  static absl::StatusOr<std::unique_ptr<CalibrationClient>> Create(ClientOptions options);

  CalibrationClient(const CalibrationClient&) = delete;
  CalibrationClient& operator=(const CalibrationClient&) = delete;
  ~CalibrationClient();

  // An empty request_id is replaced by one made up here, so that the tries of this call make one
  // calibration.
  absl::StatusOr<v1::Calibration> CreateCalibration(v1::CreateCalibrationRequest request,
                                                    const CallOptions& options = {}) const;

  absl::StatusOr<v1::Calibration> Get(const std::string& calibration_id,
                                      const CallOptions& options = {}) const;

  // Newest first, from all pages; without their streams.
  absl::StatusOr<std::vector<v1::Calibration>> List(const CalibrationFilter& filter = {},
                                                    const CallOptions& options = {}) const;

  // The calibration of this id or, where there is none, of this label. NOT_FOUND: neither;
  // FAILED_PRECONDITION: several carry the label, and the message lists their ids.
  absl::StatusOr<v1::Calibration> Find(const std::string& id_or_label,
                                       const CallOptions& options = {}) const;

  absl::StatusOr<v1::Calibration> Finalize(const FinalizeRequest& request,
                                           const CallOptions& options = {}) const;

  // NOT_FOUND also where an earlier try of this call deleted it and the answer was lost.
  absl::Status Delete(const std::string& calibration_id, const CallOptions& options = {}) const;

  // Opens a stream, new or begun before, and learns where it goes on. INVALID_ARGUMENT, before
  // anything is sent, where the options make no sense. `options` hold for the whole stream.
  absl::StatusOr<std::unique_ptr<ActivationStream>> OpenStream(
      const StreamOptions& stream, const CallOptions& options = {}) const;

  // A whole stream of rows that are all there: x [m, N] and, for mismatched calibrations, the same
  // rows of X~. `stream` needs its ids only; types, N and progress are taken from x.
  absl::StatusOr<v1::StreamProgress> Accumulate(StreamOptions stream, const TensorView& x,
                                                const std::optional<TensorView>& x_quantized,
                                                const CallOptions& options = {}) const;

  // Adds sums made elsewhere, once for each stream_id however often it is tried. INVALID_ARGUMENT,
  // before anything is sent, as ShapeOf and for tokens below 1.
  absl::StatusOr<v1::ImportStatisticsResponse> Import(const std::string& calibration_id,
                                                      const std::string& stream_id,
                                                      const StatisticsView& statistics,
                                                      const CallOptions& options = {}) const;

  // The sums of one portion, F64. A try that breaks begins anew. DATA_LOSS where the answer stops
  // short.
  absl::StatusOr<Statistics> Export(const std::string& calibration_id,
                                    v1::Portion portion = v1::PORTION_FIT,
                                    v1::MatrixLayout layout = v1::MATRIX_LAYOUT_UPPER,
                                    const CallOptions& options = {}) const;

 private:
  struct Connection;
  explicit CalibrationClient(std::shared_ptr<const Connection> connection);

  std::shared_ptr<const Connection> connection_;
};

}  // namespace certiq

#endif  // CERTIQ_CLIENT_CPP_INCLUDE_CERTIQ_CALIBRATION_CLIENT_H_
