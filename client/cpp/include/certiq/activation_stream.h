// Resumable stream of activation rows into a calibration, in which each row counts once.
#ifndef CERTIQ_CLIENT_CPP_INCLUDE_CERTIQ_ACTIVATION_STREAM_H_
#define CERTIQ_CLIENT_CPP_INCLUDE_CERTIQ_ACTIVATION_STREAM_H_

#include <cstdint>
#include <memory>
#include <optional>
#include <string>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "certiq/client.h"
#include "certiq/tensor.h"
#include "certiq/v1/calibration_service.pb.h"

namespace certiq {

struct StreamOptions {
  std::string calibration_id = {};
  // 1 to 128 bytes, unique within the calibration: the rank, for example.
  std::string stream_id = {};
  // N, and the element types of the rows; x_quantized for mismatched calibrations only.
  int64_t features = 0;
  v1::DataType x = v1::DATA_TYPE_UNSPECIFIED;
  v1::DataType x_quantized = v1::DATA_TYPE_UNSPECIFIED;
  // Rows of one chunk. 0: as many as fit into 1 MiB, at least one. A stream that is taken up again
  // by another process must be cut the same way: same types, same chunk_rows.
  int64_t chunk_rows = 0;
  // Bytes of chunks that are kept because a crash of the server could take them. Once there are
  // more, Write waits until the server has made some durable.
  int64_t window_bytes = int64_t{256} << 20;
  // Rows there will be, if known: for progress only.
  int64_t expected_rows = 0;
};

// A resumable writer. The rows of all Write calls, one after the other, are cut into chunks of
// chunk_rows whatever the sizes of the calls, so that the same rows are the same chunks. Where the
// stream exists already, the server says how many chunks it has, and as many are skipped: a
// process that was restarted writes the same rows again from the first one on. A call that breaks
// is opened again and goes on from where the server says, with the waits of ClientOptions::retry
// and, once it was open, RetryPolicy::resume_budget.
//
// Not thread-safe; uses a thread of its own. Outlives its client. Destroying it without Close()
// ends the call; what the server received stays.
class ActivationStream {
 public:
  class Sender;
  // Called by CalibrationClient::OpenStream.
  explicit ActivationStream(std::unique_ptr<Sender> sender);
  ActivationStream(const ActivationStream&) = delete;
  ActivationStream& operator=(const ActivationStream&) = delete;
  ~ActivationStream();

  // Adds rows x [m, N], with the same rows of X~ for mismatched calibrations; m >= 1. The bytes may
  // go when it returns. Blocks while the window is full or the server out of reach.
  //
  // Errors: the server's status, ABORTED among them (a newer call took the stream over);
  // INVALID_ARGUMENT where the tensors are not what StreamOptions announced;
  // FAILED_PRECONDITION where what the server holds of this stream was cut into other chunks;
  // DATA_LOSS where the server lost what it had called durable;
  // CANCELLED, DEADLINE_EXCEEDED by the options, the latter counted from OpenStream.
  // But for INVALID_ARGUMENT found here, every later call returns the same error.
  absl::Status Write(const TensorView& x,
                     const std::optional<TensorView>& x_quantized = std::nullopt);

  // Sends what is left and waits until all of it is durable. Errors as Write, and
  // FAILED_PRECONDITION where the server holds more of this stream than was written now.
  absl::StatusOr<v1::StreamProgress> Close();

 private:
  std::unique_ptr<Sender> sender_;
};

}  // namespace certiq

#endif  // CERTIQ_CLIENT_CPP_INCLUDE_CERTIQ_ACTIVATION_STREAM_H_
