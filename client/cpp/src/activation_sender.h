// Sender behind ActivationStream: chunks, positions, recovery of calls that break.
#ifndef CERTIQ_CLIENT_CPP_SRC_ACTIVATION_SENDER_H_
#define CERTIQ_CLIENT_CPP_SRC_ACTIVATION_SENDER_H_

#include <cstdint>
#include <memory>
#include <optional>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "accumulate_call.h"
#include "certiq/activation_stream.h"
#include "chunk_window.h"
#include "connection.h"
#include "retry_loop.h"

namespace certiq {

// Three positions of the stream matter, in chunks: the server's `durable`, before which nothing is
// kept; its `received`, where a call goes on; and window_.next(), how far the rows of the caller
// were cut. `received` may lie before window_.next() (chunks to send again after a crash) or
// beyond it (a restarted process: chunks to skip).
class ActivationStream::Sender {
 public:
  Sender(std::shared_ptr<const ServiceConnection<v1::CalibrationService>> connection,
         StreamOptions stream, int64_t chunk_rows, CallOptions options);

  // Opens the first call.
  absl::Status Open() { return Remember(EnsureOpen()); }
  absl::Status Write(const TensorView& x, const std::optional<TensorView>& x_quantized);
  absl::StatusOr<v1::StreamProgress> Close();

 private:
  absl::Status CheckRows(const TensorView& x, const std::optional<TensorView>& x_quantized) const;
  // Opens calls until one has said where to go on.
  absl::Status EnsureOpen();
  // Returns once everything in the window was sent and the window is not full.
  absl::Status SendWhatIsThere();
  // The same, and waits until the server ended the call with everything durable.
  absl::Status SendAllAndFinish();
  // Checks, as soon as the window reaches that far, that the server's chunks were cut as here.
  absl::Status CheckPosition();
  bool SendPending();
  absl::Status DropDurable();
  // Takes the end of a call: OK where another one may be opened, or all is done (finished_).
  absl::Status Recover(bool everything_sent);
  absl::Status Remember(absl::Status status);
  void Report();

  const std::shared_ptr<const ServiceConnection<v1::CalibrationService>> connection_;
  const StreamOptions stream_;
  const CallOptions options_;
  RetryLoop retry_loop_;
  ChunkWindow window_;
  // The first error that ended the stream, which all later calls return.
  absl::Status failed_;

  std::unique_ptr<AccumulateCall> call_;
  // The next chunk of this call.
  int64_t position_ = 0;
  // Where this call began, until it was compared with the rows here.
  std::optional<v1::StreamProgress> unchecked_;
  v1::StreamProgress last_;
  bool opened_once_ = false;
  bool finished_ = false;
  int64_t furthest_ = 0;
};

}  // namespace certiq

#endif  // CERTIQ_CLIENT_CPP_SRC_ACTIVATION_SENDER_H_
